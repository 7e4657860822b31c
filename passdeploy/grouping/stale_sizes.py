"""Integer attributes of modules that may hold stale sizes after channels were cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from passdeploy.channels.groups import SizeAttribute
from passdeploy.grouping.constraints import LabelledSize
from passdeploy.grouping.shape_check import Stop
from passdeploy.slimming.size_attributes import read_size_attribute
from passdeploy.tracing.trace import OpRecord

DimPosition = tuple[int, int, int]  # 0 for results and 1 for inputs, number of the tensor among these, dimension
AttributesOfOwner = tuple[int, str, list[tuple[str, Any]]]  # depth, name of the child, its (attribute, value) pairs

_TORCH_LAYERS = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase, nn.modules.conv._ConvNd)
_TORCH_SIZES = {  # attributes of these layers that slimming updates from the weights
    "in_features",
    "out_features",
    "normalized_shape",
    "num_features",
    "in_channels",
    "out_channels",
    "groups",
}


class AttributeFixes:
    """Finder of size attributes that may explain why a cut network stopped.

    Args:
        model: the whole network.
        op_log: the operations of the whole network.
    """

    def __init__(self, model: nn.Module, op_log: Sequence[OpRecord]) -> None:
        self._model, self._op_log = model, op_log

    def candidates(self, stop: Stop, cut: nn.Module, size_of: Callable[[Tensor], int]) -> Iterator[list[LabelledSize]]:
        """Yield sets of attributes that may be stale, those of the innermost module first.

        Each attribute comes with the same attribute of other modules of its class.

        Args:
            stop: where the cut network stopped.
            cut: the cut network; its attributes are read before this method returns.
            size_of: labels of a dimension -> its size in the cut network.
        """
        changed = {position: size for position, (size, labels) in _sizes(stop.record) if size_of(labels) != size}
        return self._explaining(stop.record, _integers_around(stop.record, cut), changed)

    def _explaining(
        self, failed: OpRecord, owners: Sequence[AttributesOfOwner], changed: Mapping[DimPosition, int]
    ) -> Iterator[list[LabelledSize]]:
        """Yield the attributes that equal a changed size: each alone, then all of one module together."""
        for depth, child, attributes in owners:
            together: list[LabelledSize] = []
            for attribute, value in attributes:
                for number, positions in enumerate(_explanations(value, changed)):
                    fix = list(self._in_all_modules(failed, depth, child, attribute, positions))
                    together += fix if number == 0 else []
                    yield fix
            if len({size.attribute.attribute for size in together}) > 1:
                yield together  # such as a number of heads and a width, which are only right together

    def _in_all_modules(
        self,
        failed: OpRecord,
        depth: int,
        child: str,
        attribute: str,
        positions: Mapping[int | None, DimPosition],
    ) -> Iterator[LabelledSize]:
        """Yield an attribute in every module of a class, with the labels of the same call of the same line there."""
        kind = type(self._model.get_submodule(failed.modules[-depth]))
        calls = self._calls_by_module(failed, depth)
        call_index = next(
            index for records in calls.values() for index, record in enumerate(records) if record is failed
        )
        for module, records in calls.items():
            if type(self._model.get_submodule(module)) is not kind or call_index >= len(records):
                continue
            sizes, owner = dict(_sizes(records[call_index])), ".".join(part for part in (module, child) if part)
            for index, position in positions.items():
                size, labels = sizes.get(position, (None, None))
                size_attribute = SizeAttribute(owner, attribute, index)
                if labels is not None and _has_value(self._model, size_attribute, size):
                    yield LabelledSize(size_attribute, labels)

    def _calls_by_module(self, failed: OpRecord, depth: int) -> dict[str, list[OpRecord]]:
        """Map each module at this depth to the operations of the failed line of code inside it, in order."""
        calls: dict[str, list[OpRecord]] = {}
        for record in self._op_log:
            if (record.op, record.source) == (failed.op, failed.source) and len(record.modules) >= depth:
                calls.setdefault(record.modules[-depth], []).append(record)
        return calls


def _integers_around(failed: OpRecord, cut: nn.Module) -> list[AttributesOfOwner]:
    """Read integers, tuples and lists of the modules around an operation, the innermost module first.

    Children are included: a method of a child that is called directly runs in the name of its parent.
    """
    return [
        (depth, child, _integers_of(owner))
        for depth in range(1, len(failed.modules) + 1)
        for module in (cut.get_submodule(failed.modules[-depth]),)
        for child, owner in (("", module), *module.named_children())
    ]


def _integers_of(module: nn.Module) -> list[tuple[str, Any]]:
    is_torch_layer = isinstance(module, _TORCH_LAYERS)
    return [
        (attribute, value)
        for attribute, value in vars(module).items()
        if (type(value) is int or isinstance(value, tuple | list))
        and not (is_torch_layer and attribute in _TORCH_SIZES)
    ]


def _sizes(record: OpRecord) -> Iterator[tuple[DimPosition, tuple[int, Tensor]]]:
    """Yield the position, the size in the whole network and the labels of every labelled dimension."""
    for side, tensors in enumerate((record.results, record.inputs)):
        for number, (shape, labels) in enumerate(tensors):
            for dim, vector in labels.items():
                yield (side, number, dim), (shape[dim], vector)


def _explanations(value: Any, changed: Mapping[DimPosition, int]) -> Iterator[dict[int | None, DimPosition]]:
    """Yield ways in which an attribute may state changed sizes: index in it (None: all of it) -> position of the size.

    The entries of a list are explained together: sizes of a split are only right as a whole.
    """
    if type(value) is int:
        for position, size in changed.items():
            if size == value:
                yield {None: position}
    elif isinstance(value, tuple | list):
        stated: dict[int | None, DimPosition] = {}
        for index, item in enumerate(value):
            equal = [position for position, size in changed.items() if type(item) is int and size == item]
            own = [position for position in equal if position[:2] == (0, index)]  # a size of result number `index`
            if equal:
                stated[index] = (own or equal)[0]
        if stated:
            yield stated


def _has_value(model: nn.Module, attribute: SizeAttribute, value: int | None) -> bool:
    try:
        found = read_size_attribute(model, attribute)
    except (AttributeError, IndexError, TypeError):
        return False
    return type(found) is int and found == value
