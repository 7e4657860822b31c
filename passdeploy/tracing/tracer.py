"""Follow every channel of a network through one forward pass.

The network's own code runs, on an example input, under a `TorchDispatchMode` that sees every
tensor operation; without values (sketch.py) where it gets along without them. Beside each tensor
we keep the labels along each of its dimensions; a rule per operation (rules/) says how labels
pass through it. Nothing is inferred from autograd or from module types, so reshapes, chunks,
shuffles and functional calls are followed like anything else.

An operation without a rule protects the channels that touch it, with its name, its module and the
line of the model's code as the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passdeploy.models.cloning import named_state
from passdeploy.models.modes import evaluating
from passdeploy.models.reduction_calls import ReductionCallTracker
from passdeploy.tracing.dispatch import OpObserver, source_line
from passdeploy.tracing.labels import LabelUnionFind, Reason
from passdeploy.tracing.op_call import OpCall
from passdeploy.tracing.trace import (
    DimChoice,
    DimChoiceKey,
    DimLabels,
    LabelledShape,
    OpMacs,
    OpRecord,
    ReductionRecord,
    StateDim,
    Trace,
)

Rule = Callable[["ChannelTracer", OpCall], None]


class ChannelTracer(OpObserver):
    """The mode under which the model runs; rules read and write labels through it."""

    def __init__(
        self,
        model: nn.Module,
        find_rule: Callable[[torch._ops.OpOverload], Rule | None],
        choose: Mapping[DimChoiceKey, int],
        *,
        is_meta: bool,
    ) -> None:
        super().__init__(is_meta=is_meta)
        self.union_find = LabelUnionFind()
        self._find_rule, self._choose = find_rule, choose
        self._labels = WeakTensorDict[DimLabels]()
        self._state = WeakTensorDict[str]()  # parameters and buffers, and their names
        self._calls = ReductionCallTracker()
        self._current_reduction: tuple[str, int] | None = (
            None  # the statistic that is being taken: which module's, and its number
        )
        self._used_parameters: set[str] = set()  # names of parameters and buffers
        sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
        self.trace = Trace(self.union_find, tuple(self._label_state(model)), sizes, is_meta=is_meta)

    def _label_state(self, model: nn.Module) -> Iterator[StateDim]:
        state = list(named_state(model))
        # A dimension of size one has nothing to remove.
        dims = [
            (name, tensor, dim, size) for name, tensor in state for dim, size in enumerate(tensor.shape) if size > 1
        ]
        sizes = [size for *_, size in dims]
        own = {name: DimLabels() for name, _ in state}
        for name, tensor in state:
            self._labels[tensor], self._state[tensor] = own[name], name
        for (name, _, dim, _), labels in zip(dims, self.union_find.new_labels(sum(sizes)).split(sizes), strict=True):
            own[name][dim] = labels
            yield StateDim(name, dim, labels)

    # What rules use

    def labels(self, tensor: Tensor | None) -> DimLabels:
        """The labels of a tensor by dimension; dimensions without removable channels are absent."""
        return {} if tensor is None else self._labels.get(tensor) or {}

    def set_labels(self, tensor: Tensor, labels: DimLabels) -> None:
        """Give `tensor` its labels; dimensions of size one carry none."""
        for dim, vector in labels.items():
            if tensor.size(dim) != len(vector):
                raise AssertionError(f"{len(vector)} labels along dimension {dim} of {tuple(tensor.shape)}")
        alone = [dim for dim in labels if tensor.size(dim) == 1]
        for dim in alone:
            self.protect(labels[dim], "picked out alone")
        self._labels[tensor] = {dim: vector for dim, vector in labels.items() if dim not in alone}

    def is_state(self, tensor: Tensor | None) -> bool:
        """Whether `tensor` is a parameter or buffer itself, not computed from one."""
        return tensor is not None and self._state.get(tensor) is not None

    def join(self, first: Tensor, second: Tensor, why: str) -> None:
        """Join two label vectors; what meets NONE is protected for the reason `why`."""
        self.union_find.join(first, second, self.reason(why))

    def protect(self, labels: Tensor, why: str) -> None:
        """These channels must stay."""
        self.union_find.protect(labels, self.reason(why))

    def protect_all(self, tensors: Sequence[Tensor], why: str) -> None:
        """Every channel of these tensors must stay."""
        for tensor in tensors:
            for vector in self.labels(tensor).values():
                self.protect(vector, why)

    def record_outputs(self, labels: Tensor) -> None:
        """These labels are the output channels of the layer that is running."""
        self.trace.output_labels.append(labels)

    def record_reads(self, labels: Tensor) -> None:
        """These labels are the weight slices with which the running layer reads its input."""
        self.trace.read_labels.append(labels)

    def record_macs(self, macs: int, *dims: Tensor | None) -> None:
        """Book `macs` multiply-adds that are proportional to each of the labelled `dims`."""
        module = self._calls.module
        self.trace.op_macs.append(OpMacs(module, macs, tuple(dim for dim in dims if dim is not None)))

    def reason(self, why: str) -> Reason:
        """`why`, with the operation, the module and the line of code that is running."""
        op = self._current_call.name if self._current_call else ""
        return Reason(why, op, self._calls.module, self._current_source)

    def collapse_recording_choice(self, element_labels: Tensor) -> DimLabels:
        """Labels of every element of a tensor as labels along its dimensions; see `LabelUnionFind.collapse_to_one_dim`.

        Where there is a choice of dimension it is noted, so that `trace_channels` can be told to choose again.
        """
        place = (
            self._calls.module,
            self._current_call.name if self._current_call else "",
            self._current_source,
        )
        key = (*place, sum(known[:3] == place for known in self.trace.choices))
        rank = self._choose.get(key, 0)
        collapsed, options = self.union_find.collapse_to_one_dim(
            element_labels, self.reason("cannot be removed from a box"), rank=rank
        )
        if options > 1:
            self.trace.choices[key] = DimChoice(next(iter(collapsed.values())), options)
        return collapsed

    def protect_and_unlabel(self, call: OpCall, why: str) -> None:
        """Every channel that an operation touches must stay, and nothing is known of its results."""
        self.protect_all(call.tensors, why)
        for result in call.results:
            self._labels[result] = {}

    # What `trace_channels` uses

    def tracking_modules(self, model: nn.Module) -> AbstractContextManager[None]:
        """Know, while the model runs, which of its modules is running."""
        return self._calls.hooked_into(model)

    def run_forward(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        """ChannelTracer through one forward pass; what comes out must stay."""
        for leaf in tree_leaves(list(inputs)):
            if isinstance(leaf, Tensor):
                self._labels[leaf] = {}
        outputs = self.run_model(model, inputs)
        self._current_call = None
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                for vector in self.labels(output).values():
                    self.union_find.protect(vector, Reason("the model's output"))

    def has_unused_parameters(self, model: nn.Module) -> bool:
        """Whether a parameter was not used."""
        return any(name not in self._used_parameters for name, _ in model.named_parameters())

    def run_training_forward(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        """ChannelTracer once more in training mode, for heads that run only then; a model that wants targets is left alone.

        Joins and protections are kept. What the pass cost and how it went are not: nobody deploys it.
        """
        main, scratch = self.trace, Trace(self.union_find, self.trace.state, self.trace.parameters)
        buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
        twice = [torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in inputs]
        self.trace, self._choose = scratch, {}
        try:
            with evaluating(model, training=True), torch.random.fork_rng(devices=[]):
                self.run_forward(model, twice)
        except Exception:
            if self.is_meta:
                raise  # with values it may go well
            self._current_call = None
        finally:
            for name, tensor in model.named_buffers():
                tensor.copy_(buffers[name])
            self.trace = main
            main.output_labels += scratch.output_labels
            main.read_labels += scratch.read_labels

    _current_call: OpCall | None = None
    _current_source = ""  # file:line of the model's own code that is running

    def on_op(self, call: OpCall) -> None:
        """Pass the labels on through one operation, and note that it happened."""
        self._current_call, self._current_source = call, source_line()
        self._used_parameters.update(name for tensor in call.tensors if (name := self._state.get(tensor)))
        inputs = self._labelled_shapes(call.tensors)  # before the rule: an operation in place changes them
        constants = [self._labels.get(tensor) is None for tensor in call.tensors]
        rule = self._find_rule(call.op)
        if rule is None:
            self.protect_and_unlabel(call, "no rule follows channels through this operation")
        else:
            try:
                rule(self, call)
            except Exception as error:
                if self.is_meta:
                    raise  # it may want values
                # A case the rule did not foresee costs these channels, not the model.
                self.protect_and_unlabel(call, f"could not be followed: {error}")
        self._current_call = None
        for result in call.results:
            if all(constants):
                self._labels.forget(result)
            elif self._labels.get(result) is None:
                self._labels[result] = {}
        self.trace.op_log.append(
            OpRecord(
                call.name,
                tuple(self._calls.running),
                self._current_source,
                inputs,
                self._labelled_shapes(call.results),
                call.scalars,
                self.is_deriving_sizes,
                any(constants),
            )
        )

    def _labelled_shapes(self, tensors: Sequence[Tensor]) -> tuple[LabelledShape, ...]:
        return tuple((tuple(tensor.shape), self.labels(tensor)) for tensor in tensors)

    @contextmanager
    def around_reduction(self) -> Iterator[None]:
        """Know which statistic the operations of the next moments are part of."""
        self._current_reduction = self._calls.next_key()
        try:
            yield
        finally:
            self._current_reduction = None

    def record_reduction(self, dim: int, labels: Tensor) -> bool:
        """Note that a statistic is taken over these channels; False if it is one that `masked` cannot restrict."""
        if self._current_reduction is None:
            return False
        self.trace.reductions.append(ReductionRecord(*self._current_reduction, dim, labels))
        return True


Value = TypeVar("Value")


class WeakTensorDict(Generic[Value]):
    """What is known of tensors for as long as they live; a plain dictionary that looks twice."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[ref[Tensor], Value]] = {}

    def __setitem__(self, tensor: Tensor, known: Value) -> None:
        self._known[id(tensor)] = ref(tensor), known

    def get(self, tensor: Tensor) -> Value | None:
        """What is known of `tensor`, if anything is."""
        found = self._known.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def forget(self, tensor: Tensor) -> None:
        """Nothing is known of it any more."""
        self._known.pop(id(tensor), None)
