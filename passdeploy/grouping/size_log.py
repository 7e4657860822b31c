"""Run a network with sizes that remember where they come from, and log what its code does with them.

Sizes of tensors and attributes of layers are tracked (tracked_sizes.py) as far as channels lie along them.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import chain, combinations, product
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from passdeploy.channels.groups import SizeAttribute
from passdeploy.grouping.constraints import Constraints
from passdeploy.grouping.gather import GroupBuilder
from passdeploy.grouping.traced_network import TracedNetwork
from passdeploy.grouping.tracked_sizes import (
    ComparisonLog,
    Formula,
    TrackedNumber,
    is_of_model,
    operand_of,
    plain,
    track,
)
from passdeploy.models.modes import evaluating
from passdeploy.slimming.size_attributes import read_size_attribute, write_size_attribute_
from passdeploy.tracing.dispatch import OpObserver, owner_of
from passdeploy.tracing.op_call import OpCall
from passdeploy.tracing.trace import DimLabels, OpRecord
from passdeploy.tracing.weak_tensors import WeakTensorDict


def log_of_sizes(network: TracedNetwork, constraints: Constraints) -> ComparisonLog:
    """Run the whole network once, and log what its code does with sizes that depend on widths.

    Torch's own comparisons are left out, and those after an operation that the trace does not have in its place.
    """
    # Some networks change their buffers when they run.
    model = network.trial_cloner.copy(lambda _, old: old if isinstance(old, nn.Parameter) else old.clone())
    log = ComparisonLog()
    observer = _LabelObserver(network, model)
    sizes = _SizeTracker(observer, network.builder, constraints, log)
    for attribute, labels in _size_attributes(network, constraints):
        size = read_size_attribute(model, attribute)
        if type(size) is int and size == len(labels):  # not yet tracked, and no layer norm over several dimensions
            write_size_attribute_(model, attribute, sizes.tracked(size, labels))
    try:
        with torch.no_grad(), evaluating(model), sizes:
            observer.run_model(model, network.trial_inputs)
    except Exception:  # noqa: S110 - code that expects plain integers may raise anything; what was recorded before counts
        pass
    log.forget_frame()
    return log


class _LabelObserver(OpObserver):
    """Observer of the whole network that knows the labels of its tensors from the trace."""

    def __init__(self, network: TracedNetwork, model: nn.Module) -> None:
        super().__init__(is_meta=network.trace.is_meta)
        self._op_log, self._position = network.trace.op_log, 0
        self._labels = WeakTensorDict[DimLabels]()
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for state in network.trace.state:
            if (tensor := tensors.get(state.tensor)) is not None:
                self._labels[tensor] = {**self.labels(tensor), state.dim: state.labels}

    def labels(self, tensor: Tensor) -> DimLabels:
        """Return the labels of a tensor by dimension."""
        return self._labels.get(tensor) or {}

    def on_op(self, call: OpCall) -> None:
        """Take the labels of the results from the trace, as long as the operations are those of the trace."""
        if self._position >= len(self._op_log) or (record := self._op_log[self._position]).op != call.name:
            self._position = len(self._op_log)
            return
        for result, (shape, labels) in zip(call.results, record.results, strict=False):
            self._labels[result] = labels if tuple(result.shape) == shape else {}
        self._position += 1


class _SizeTracker(TorchFunctionMode):
    """Function mode in which the sizes of labelled tensors are tracked.

    Args:
        observer: knows the labels of a tensor.
        builder: knows the sizes of labelled dimensions as functions of widths,
        constraints: under these constraints.
        log: gets the comparisons.
    """

    def __init__(
        self, observer: _LabelObserver, builder: GroupBuilder, constraints: Constraints, log: ComparisonLog
    ) -> None:
        super().__init__()
        self._observer, self._builder, self._constraints, self._log = observer, builder, constraints, log

    def tracked(self, size: int, labels: Tensor) -> Any:
        """Return the size of a dimension with these labels, tracked if it depends on widths."""
        with _disable_current_modes():  # looking labels up is no operation of the network
            factor = self._builder.size_of(self._constraints, labels)
        return track(size, factor, self._log) if factor.spans else size

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one torch function; track the sizes that it returns, and those at which it fails."""
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, TrackedNumber) for leaf in leaves) and is_of_model(_calling_frame()):
            self._log.has_reads = True
        try:
            result = func(*args, **(kwargs or {}))
        except Exception:
            self._log_failure(leaves)
            raise
        if func in _MAKING_TENSORS:
            for number in leaves:
                self._log_leaving(number)
        if func not in _SIZES or not self._observer.labels(args[0]):
            return result
        sizes = self._sizes_of(args[0])
        if func is Tensor.__len__:
            self._log_leaving(sizes[0])  # whatever is returned here, `len` makes it an integer
            return result
        if isinstance(result, torch.Size):
            return torch.Size(sizes)
        if func in _NUMBERS_OF_ELEMENTS:
            return reduce(operator.mul, sizes, 1)
        return sizes[(kwargs or {}).get("dim", args[-1])]

    def _sizes_of(self, tensor: Tensor) -> list[Any]:
        labels = self._observer.labels(tensor)
        return [self.tracked(size, labels[dim]) if dim in labels else size for dim, size in enumerate(tensor.shape)]

    def _log_leaving(self, number: Any) -> None:
        if isinstance(number, TrackedNumber):
            number.leave(_calling_frame())

    def _log_failure(self, leaves: Sequence[Any]) -> None:
        """Log where the sizes of different arguments differ, and stated sizes: the code may catch the error.

        `try: x = x + y` adds where the sizes fit, and only there.
        """
        shapes = [self._sizes_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        stated = [leaf for leaf in leaves if isinstance(leaf, int) and plain(leaf) > 1]
        for one, other in combinations([*shapes, stated], 2):
            for first, second in product(one, other):
                if plain(first) != plain(second):
                    self._log.add(Formula(operator.eq, operand_of(first), operand_of(second)))
        for size, divisor in product(chain(*shapes), stated):  # `x.view(b, 8, -1)` fails for ten channels
            if size % divisor:
                remainder = Formula(operator.mod, operand_of(size), operand_of(divisor))
                self._log.add(Formula(operator.eq, remainder, 0))


def _calling_frame() -> FrameType:
    """Return the frame that called the torch function which a mode handles, past the code that passes calls on."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        owner_of(frame.f_code.co_filename)[0] == "passdeploy"
        or Path(frame.f_code.co_filename).name in ("_tensor.py", "overrides.py")
    ):
        frame = frame.f_back
    return frame


_MAKING_TENSORS = {torch.tensor, torch.as_tensor, torch.asarray}
_NUMBERS_OF_ELEMENTS = {Tensor.numel, Tensor.nelement, torch.numel}
_SIZES = {Tensor.shape.__get__, Tensor.size, Tensor.__len__, *_NUMBERS_OF_ELEMENTS}  # type: ignore[attr-defined]


def _size_attributes(network: TracedNetwork, constraints: Constraints) -> Iterator[tuple[SizeAttribute, Tensor]]:
    """Yield attributes that follow a width after any cut, and the labels of the dimension that they state."""
    for size in constraints.size_attributes:
        yield size.attribute, size.labels
    for state in network.trace.state:
        module, _, tensor = state.tensor.rpartition(".")
        kind = network.class_of(module)
        for layer, names in _ATTRIBUTES_OF_WEIGHTS.items():
            if issubclass(kind, layer) and (attribute := names.get((tensor, state.dim))):
                yield SizeAttribute(module, attribute, 0 if attribute == "normalized_shape" else None), state.labels
    for record in network.trace.op_log:
        if record.op == "aten.convolution" and issubclass(
            network.class_of(record.modules[-1]), nn.modules.conv._ConvNd
        ):
            yield from _attributes_of_convolution(record)


_ATTRIBUTES_OF_WEIGHTS: dict[type, dict[tuple[str, int], str]] = {
    nn.Linear: {("weight", 0): "out_features", ("weight", 1): "in_features"},
    nn.modules.batchnorm._NormBase: {("weight", 0): "num_features", ("running_mean", 0): "num_features"},
    nn.GroupNorm: {("weight", 0): "num_channels"},
    nn.LayerNorm: {("weight", 0): "normalized_shape"},
    nn.RMSNorm: {("weight", 0): "normalized_shape"},
    nn.PReLU: {("weight", 0): "num_parameters"},
    nn.Embedding: {("weight", 0): "num_embeddings", ("weight", 1): "embedding_dim"},
    nn.RNNBase: {("weight_ih_l0", 1): "input_size", ("weight_hh_l0", 1): "hidden_size"},
}


def _attributes_of_convolution(record: OpRecord) -> Iterator[tuple[SizeAttribute, Tensor]]:
    (inputs, input_labels), (weight, _), *_ = record.inputs
    channels, module = len(inputs) - len(weight) + 1, record.modules[-1]  # a single image has no batch dimension
    if channels in input_labels:
        yield SizeAttribute(module, "in_channels", None), input_labels[channels]
        yield SizeAttribute(module, "groups", None), input_labels[channels]  # where there are as many
    if channels in record.results[0][1]:
        yield SizeAttribute(module, "out_channels", None), record.results[0][1][channels]
