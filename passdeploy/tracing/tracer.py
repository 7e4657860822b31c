"""The channel tracer: a `TorchDispatchMode` that propagates channel labels through one forward pass.

The network's own code runs on an example input, on the meta device where it needs no values (meta_model.py). For
each tensor the tracer keeps the labels along each of its dimensions; one rule per operation (rules/) computes the
labels of its results. Nothing is inferred from autograd or from module types, so reshapes, chunks, shuffles and
functional calls are followed like anything else.

An operation without a rule protects the channels that enter it, with its name, its module and the line of the model's
code as the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passdeploy.errors import ModelError
from passdeploy.models.chosen_outputs import OutputChoice, choose_outputs
from passdeploy.models.cloning import named_plain_tensors, named_state
from passdeploy.models.function_calls import CallKey, FunctionCallTracker
from passdeploy.models.input_sizes import doubled
from passdeploy.models.modes import evaluating, train_without_chance_
from passdeploy.models.outputs import comparable_in, tensors_in
from passdeploy.tracing.dispatch import OpObserver, source_line
from passdeploy.tracing.fixed_outputs import FixedOutputs
from passdeploy.tracing.labels import NONE, LabelUnionFind, Reason
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
from passdeploy.tracing.weak_tensors import WeakTensorDict

Rule = Callable[["ChannelTracer", OpCall], None]


# Operations that multiply by a weight -> where among their tensors its factors are.
_FACTORS = {"aten.convolution": slice(1, 2), "aten.mm": slice(0, None), "aten.addmm": slice(1, None)}


def _storage_of(tensor: Tensor) -> int | None:
    """Return what identifies the memory of a tensor; None where it has none of its own."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None


class ChannelTracer(OpObserver):
    """The dispatch mode under which the model is traced; rules read and write labels through it.

    Args:
        model: its parameters and buffers get labels of their own.
        find_rule: the rule of an operation, or None.
        choose: key of a choice of dimension -> the option to take; the first where there is no entry.
        is_meta: True if the model runs on the meta device, without values.
        outputs: the model's outputs that count; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        find_rule: Callable[[torch._ops.OpOverload], Rule | None],
        choose: Mapping[DimChoiceKey, int],
        *,
        is_meta: bool,
        outputs: OutputChoice | None = None,
    ) -> None:
        super().__init__(is_meta=is_meta)
        self.union_find = LabelUnionFind()
        self._find_rule, self._choose = find_rule, choose
        self._labels = WeakTensorDict[DimLabels]()
        self._watched = WeakTensorDict[tuple[Sequence[Tensor], str]]()  # see `protect_where_used`
        self._state = WeakTensorDict[str]()  # parameters and buffers, and their names
        self._calls = FunctionCallTracker()
        self._current_reduction: CallKey | None = None
        self.used_parameters: set[str] = set()  # names of parameters and buffers
        self._parameter_storages = {_storage_of(parameter) for parameter in model.parameters()} - {None}
        self.has_left = False  # values have left torch: the code may branch on them
        sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
        state = tuple(self._label_state(list(named_state(model))))
        fixed_from = self.union_find.size
        state += tuple(self._label_state(list(named_plain_tensors(model))))
        self.trace = Trace(self.union_find, state, sizes, fixed_from=fixed_from, is_meta=is_meta, outputs=outputs)
        self._fixed = FixedOutputs(model, self._labels, self.trace, self.reason)

    def _label_state(self, state: Sequence[tuple[str, Tensor]]) -> Iterator[StateDim]:
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

    # Used by the rules

    def labels(self, tensor: Tensor | None) -> DimLabels:
        """Return the labels of a tensor by dimension; dimensions without removable channels are absent."""
        return {} if tensor is None else self._labels.get(tensor) or {}

    def set_labels(self, tensor: Tensor, labels: DimLabels) -> None:
        """Set the labels of `tensor`; a dimension of size one gets none, and its channel is protected."""
        for dim, vector in labels.items():
            if tensor.size(dim) != len(vector):
                raise AssertionError(f"{len(vector)} labels along dimension {dim} of {tuple(tensor.shape)}")
        single = [dim for dim in labels if tensor.size(dim) == 1]
        for dim in single:
            self.protect(labels[dim], "picked out alone")
        self._labels[tensor] = {dim: vector for dim, vector in labels.items() if dim not in single}

    def is_fixed(self, labels: Tensor) -> bool:
        """True if all of these labels are of tensors that no weight is part of, see `Trace.fixed_from`."""
        fixed_from = self.trace.fixed_from
        return fixed_from < self.union_find.size and bool(((labels == NONE) | (labels >= fixed_from)).all())

    def is_state(self, tensor: Tensor | None) -> bool:
        """Test whether `tensor` is a parameter or buffer of the model, not computed from one."""
        return tensor is not None and self._state.get(tensor) is not None

    def join(self, first: Tensor, second: Tensor, why: str) -> None:
        """Join two label vectors entry by entry; a label opposite NONE is protected for the reason `why`."""
        self.union_find.join(first, second, self.reason(why))

    def protect(self, labels: Tensor, why: str) -> None:
        """Protect these channels from being removed."""
        self.union_find.protect(labels, self.reason(why))

    def protect_all(self, tensors: Sequence[Tensor], why: str) -> None:
        """Protect every channel of these tensors."""
        for tensor in tensors:
            for vector in self.labels(tensor).values():
                self.protect(vector, why)

    def record_outputs(self, labels: Tensor) -> None:
        """Record the output channels of the running layer."""
        self.trace.output_labels.append(labels)

    def record_reads(self, labels: Tensor) -> None:
        """Record the weight slices with which the running layer reads its input channels."""
        self.trace.read_labels.append(labels)

    def record_macs(self, macs: int, *dims: Tensor | None) -> None:
        """Record `macs` multiply-adds of the running operation, proportional to the size of each of `dims`."""
        module = self._calls.module
        self.trace.op_macs.append(OpMacs(module, macs, tuple(dim for dim in dims if dim is not None)))

    def reason(self, why: str) -> Reason:
        """Make a reason of `why` and the operation, the module and the line of code that are running."""
        op = self._current_call.name if self._current_call else ""
        return Reason(why, op, self._calls.module, self._current_source)

    def collapse_recording_choice(self, element_labels: Tensor) -> DimLabels:
        """Turn one label per element into labels along one dimension; see `LabelUnionFind.collapse_to_one_dim`.

        A choice between several dimensions is recorded in the trace, so that `trace_channels` can be given
        another one.
        """
        op = self._current_call.name if self._current_call else ""
        location = (self._calls.module, op, self._current_source)
        key = (*location, sum(known[:3] == location for known in self.trace.choices))
        rank = self._choose.get(key, 0)
        collapsed, options = self.union_find.collapse_to_one_dim(
            element_labels, self.reason("cannot be removed from a box"), rank=rank
        )
        if options > 1:
            self.trace.choices[key] = DimChoice(next(iter(collapsed.values())), options)
        return collapsed

    def protect_and_unlabel(self, call: OpCall, why: str) -> None:
        """Protect every channel that enters an operation, and give its results no labels.

        What is computed from a parameter and has its shape is a weight; it keeps the protected labels, so that the
        layer that it belongs to is listed with the reason.
        """
        self.protect_all(call.tensors, why)
        for result in call.results:
            alike = (each for each in call.tensors if self.is_state(each) and each.shape == result.shape)
            self._labels[result] = dict(self.labels(next(alike, None)))

    # Used by `trace_channels`

    @contextmanager
    def tracking_modules(self, model: nn.Module) -> Iterator[None]:
        """Keep track of the module that is running and of fixed outputs, with hooks that are removed on leaving."""
        with self._calls.hooked_into(model), self._fixed.following():
            yield

    def run_forward(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        """Trace one forward pass and protect the channels of the model's outputs that count."""
        self._protect_outputs(choose_outputs(self._run(model, inputs), self.trace.outputs))

    def _run(self, model: nn.Module, inputs: Sequence[Any]) -> Any:
        for leaf in tree_leaves(list(inputs)):
            if isinstance(leaf, Tensor):
                self._labels[leaf] = {}
        outputs = self.run_model(model, inputs)
        self._current_call = None
        self._fixed.protect_overwritten()
        return outputs

    def _protect_outputs(self, outputs: Any) -> None:
        if not comparable_in(outputs):
            raise ModelError(
                f"the network returns {type(outputs).__name__}, in which no tensor, array or number can be found.\n"
                "Let it return its outputs as tensors, in tuples, dictionaries or dataclasses."
            )
        self._protect_watched(tensors_in(outputs))
        tensors = tensors_in(outputs)
        if tensors and not self.has_left and all(self._labels.get(output) is None for output in tensors):
            raise ModelError(
                "no output of the network can be followed back to its layers: tensors of a class of their own, or "
                "copies of Python objects, hide where they come from.\nGive and return plain tensors."
            )
        for output in tensors_in(outputs):
            for vector in self.labels(output).values():
                self.union_find.protect(vector, Reason("the model's output"))

    def protect_kept(self, model: nn.Module) -> None:
        """Protect what modules keep in attributes and no layer reads: the user may, as further outputs."""
        kept: list[Tensor] = []
        for module in model.modules():
            own = [value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")]
            for leaf in tree_leaves(own):
                kept += self.labels(leaf).values() if isinstance(leaf, Tensor) else ()
        self._protect_unread(kept, "kept in an attribute, and no layer reads it")

    def protect_unread(self) -> None:
        """Protect what no layer reads, where the code may return it for other images."""
        why = "no layer reads it, and the code branches on values: it may be an output"
        self._protect_unread(self.trace.output_labels, why)

    def _protect_unread(self, vectors: Sequence[Tensor], why: str) -> None:
        if not vectors:
            return
        labels = torch.cat([*vectors])
        read = self.union_find.find(torch.cat([*self.trace.read_labels, labels[:0]]))
        self.union_find.protect(labels[~torch.isin(self.union_find.find(labels), read)], Reason(why))

    def _protect_outputs_of_training(self, outputs: Any, known: Tensor) -> None:
        """Protect the outputs of heads that run in training only; which of all outputs count then, nobody can say.

        Args:
            outputs: of the pass in training mode, which may have another form than those of evaluation.
            known: labels of the parameters and buffers that were used in evaluation.
        """
        roots = self.union_find.find(known)
        for output in tensors_in(outputs):
            for vector in self.labels(output).values():
                self.union_find.protect(
                    vector[~torch.isin(self.union_find.find(vector), roots)], Reason("the model's output")
                )

    def on_leaving(self, tensor: Tensor) -> None:
        """Protect the channels of a tensor whose values leave torch: they are outputs as well."""
        self._current_source = source_line()
        self.has_left = True
        self.protect_all([tensor], "its values leave torch")
        self._protect_watched([tensor])

    def on_attention_weights(self, weights: Tensor, queries: Tensor) -> None:
        """Remember the weights of attention: heads and their widths may be removed as long as nobody uses them."""
        # They are averaged over heads or listed by head.
        self.protect_where_used(weights, [*self.labels(queries).values()], "the weights of attention are used")

    def protect_where_used(self, tensor: Tensor, labels: Sequence[Tensor], why: str) -> None:
        """Protect these channels as soon as anything computes with `tensor`, or it is an output."""
        self._watched[tensor] = labels, why

    def _protect_watched(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            labels, why = self._watched.get(tensor) or ((), "")
            for vector in labels:
                self.protect(vector, why)

    def has_unused_parameters(self, model: nn.Module) -> bool:
        """Test whether the passes so far left a parameter unused."""
        return any(name not in self.used_parameters for name, _ in model.named_parameters())

    def run_training_forward(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        """Trace a pass in training mode, for heads that run only then; skip a model that fails (it may want targets).

        Joins, protections, output and read labels are kept. Costs and operations are not: this pass is not deployed.
        """
        main = self.trace
        scratch = Trace(self.union_find, main.state, main.parameters, main.fixed_outputs, main.fixed_from)
        buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
        used = [state.labels for state in main.state if state.tensor in self.used_parameters]
        self.trace, self._choose = scratch, {}
        try:
            with evaluating(model, training=True), torch.random.fork_rng(devices=[]):
                train_without_chance_(model)  # what dropout draws has channels of its own
                if main.outputs is None:
                    self.run_forward(model, doubled(inputs))
                else:
                    self._protect_outputs_of_training(self._run(model, doubled(inputs)), torch.cat(used))
        except Exception:
            if self.is_meta:
                raise  # the pass may succeed with values
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
        """Apply the rule of one operation to its labels, and append it to the op log."""
        self._current_call, self._current_source = call, source_line()
        self.used_parameters.update(name for tensor in call.tensors if (name := self._state.get(tensor)))
        inputs = self._labelled_shapes(call.tensors)  # before the rule, which changes them for an in-place operation
        self._protect_watched(call.tensors)
        constants = [self._labels.get(tensor) is None for tensor in (*call.tensors, *call.given_results)]
        overwritten = [(tensor, self.labels(tensor)) for tensor in call.given_results]
        rule = self._find_rule(call.op)
        if rule is None:
            self.protect_and_unlabel(call, "no rule follows channels through this operation")
        else:
            try:
                rule(self, call)
            except Exception as error:
                if self.is_meta:
                    raise  # the rule may need values
                # A case that the rule does not handle protects these channels; the rest of the model stays prunable.
                self.protect_and_unlabel(call, f"could not be followed: {error}")
        for tensor, labels in overwritten:
            self._join_overwritten(tensor, labels)
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
                call.name in _FACTORS and not any(map(self.is_parameter, call.tensors[_FACTORS[call.name]])),
            )
        )

    def is_parameter(self, tensor: Tensor) -> bool:
        """True for a parameter and what shares its memory, such as its transpose."""
        return _storage_of(tensor) in self._parameter_storages

    def on_alias(self, tensor: Tensor, alias: Tensor) -> None:
        """Give the labels of `tensor` to another that stands for it."""
        if (labels := self._labels.get(tensor)) is not None:
            self._labels[alias] = labels

    def _join_overwritten(self, tensor: Tensor, before: DimLabels) -> None:
        """Join the labels of a result with those that the tensor given as `out=` had before: they share its size."""
        for dim, vector in self.labels(tensor).items():
            if (other := before.get(dim)) is not None and len(other) == len(vector):
                self.join(vector, other, "meets channels that must stay")
            else:
                self.protect(vector, "written into a tensor whose size cannot change")
        for dim in before.keys() - self.labels(tensor).keys():
            self.protect(before[dim], "overwritten by a tensor whose size cannot change")

    def _labelled_shapes(self, tensors: Sequence[Tensor]) -> tuple[LabelledShape, ...]:
        return tuple((tuple(tensor.shape), self.labels(tensor)) for tensor in tensors)

    @contextmanager
    def around_reduction(self) -> Iterator[None]:
        """Remember, inside this context, which reduction call the operations belong to."""
        self._current_reduction = self._calls.next_key()
        try:
            yield
        finally:
            self._current_reduction = None

    def record_reduction(self, dim: int, labels: Tensor) -> bool:
        """Record a reduction over these channels; False if `masked` cannot restrict it to a part of them."""
        if self._current_reduction is None:
            return False
        self.trace.reductions.append(ReductionRecord(*self._current_reduction, dim, labels))
        return True
