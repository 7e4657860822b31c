"""Numbers that a module keeps and that may be stale once channels are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from passdeploy.channels.groups import SizeAttribute
from passdeploy.grouping.gather import LabelledSize
from passdeploy.grouping.shape_check import Stop
from passdeploy.slimming.size_attributes import read_size_attribute
from passdeploy.tracing.trace import OpRecord

DimPosition = tuple[int, int, int]  # 0 for results and 1 for inputs, which of these tensors, dimension

_TORCH_MODULES = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase, nn.modules.conv._ConvNd)
_OF_TORCH = {  # attributes of these that slimming keeps true by itself
    *("in_features", "out_features", "normalized_shape", "num_features", "in_channels", "out_channels", "groups"),
}


class AttributeFixes:
    """Finds the numbers that may explain why a cut network stopped.

    Args:
        model: the network.
        script: what happens in it.
    """

    def __init__(self, model: nn.Module, op_log: Sequence[OpRecord]) -> None:
        self._model, self._op_log = model, op_log

    def of(self, stop: Stop, cut: nn.Module, size_of: Callable[[Tensor], int]) -> Iterator[list[LabelledSize]]:
        """Numbers that may be stale, nearest module first, each with its like in other modules of that class."""
        changed = {place: dense for place, (dense, labels) in _sizes(stop.record) if size_of(labels) != dense}
        for depth in range(1, len(stop.record.modules) + 1):
            module = cut.get_submodule(stop.record.modules[-depth])
            # A method of a child that is not called itself runs in the name of its parent.
            for child, owner in (("", module), *module.named_children()):
                together: list[LabelledSize] = []
                for attribute, value in list(vars(owner).items()):
                    if attribute in _OF_TORCH and isinstance(owner, _TORCH_MODULES):
                        continue  # is true already
                    for number, places in enumerate(_explanations(value, changed)):
                        repair = list(self._alike(stop.record, depth, child, attribute, places))
                        together += repair if number == 0 else []
                        yield repair
                if len({size.attribute.attribute for size in together}) > 1:  # numbers that only make sense as a whole
                    yield together

    def _alike(
        self, stopped: OpRecord, depth: int, child: str, attribute: str, places: Mapping[int | None, DimPosition]
    ) -> Iterator[LabelledSize]:
        """The same numbers of every module of that class, where the same line of code runs for the same time."""
        kind = type(self._model.get_submodule(stopped.modules[-depth]))
        turns = self._turns(stopped, depth)
        turn = next(number for same in turns.values() for number, one in enumerate(same) if one is stopped)
        for module, same in turns.items():
            if type(self._model.get_submodule(module)) is not kind or turn >= len(same):
                continue
            sizes, owner = dict(_sizes(same[turn])), ".".join(part for part in (module, child) if part)
            for index, place in places.items():
                dense, labels = sizes.get(place, (None, None))
                size_attribute = SizeAttribute(owner, attribute, index)
                if labels is not None and _has_value(self._model, size_attribute, dense):
                    yield LabelledSize(size_attribute, labels)

    def _turns(self, stopped: OpRecord, depth: int) -> dict[str, list[OpRecord]]:
        """Module at that depth -> what ran there by the same line of code, in order."""
        turns: dict[str, list[OpRecord]] = {}
        for record in self._op_log:
            if (record.op, record.source) == (stopped.op, stopped.source) and len(record.modules) >= depth:
                turns.setdefault(record.modules[-depth], []).append(record)
        return turns


def _sizes(record: OpRecord) -> Iterator[tuple[DimPosition, tuple[int, Tensor]]]:
    """Every labelled dimension of the results and inputs: its place, and its dense size and labels."""
    for side, tensors in enumerate((record.results, record.inputs)):
        for number, (shape, labels) in enumerate(tensors):
            for dim, vector in labels.items():
                yield (side, number, dim), (shape[dim], vector)


def _explanations(value: Any, changed: Mapping[DimPosition, int]) -> Iterator[dict[int | None, DimPosition]]:
    """Ways in which an attribute may state sizes that changed: place in the attribute (None: all of it) -> which size.

    The entries of a list are explained together: sizes of a split only make sense as a whole.
    """
    if type(value) is int:
        for place, dense in changed.items():
            if dense == value:
                yield {None: place}
    elif isinstance(value, tuple | list):
        stated: dict[int | None, DimPosition] = {}
        for index, item in enumerate(value):
            alike = [place for place, dense in changed.items() if type(item) is int and dense == item]
            own = [place for place in alike if place[:2] == (0, index)]  # the size of the result of that number
            if alike:
                stated[index] = (own or alike)[0]
        if stated:
            yield stated


def _has_value(model: nn.Module, attribute: SizeAttribute, value: int | None) -> bool:
    try:
        found = read_size_attribute(model, attribute)
    except (AttributeError, IndexError, TypeError):
        return False
    return type(found) is int and found == value
