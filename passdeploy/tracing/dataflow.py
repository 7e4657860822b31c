"""The data flow of one forward pass: which operation computes what from what, and inside which module calls.

Values are numbered. An operation that writes into a tensor gives it a new value, and new values to all tensors that
share its memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from passdeploy.models.chosen_outputs import OutputChoice, choose_outputs
from passdeploy.models.cloning import modules_by_name, named_state
from passdeploy.models.function_calls import ADDITION_FUNCTIONS, CallKey, FunctionCallTracker
from passdeploy.models.modes import evaluating
from passdeploy.models.outputs import tensors_in
from passdeploy.models.wrappers import calling_eagerly
from passdeploy.tracing.dispatch import OpObserver, source_line
from passdeploy.tracing.op_call import OpCall, aten
from passdeploy.tracing.weak_tensors import WeakTensorDict

# What these make does not depend on the values of the tensor that they are given, only on its shape and type.
_VALUELESS = {
    *(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.new_empty_strided),
    *(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.rand_like, aten.randn_like),
}

OTHER = object()  # in the output of a module: neither a tensor nor None


@dataclass(frozen=True)
class FlowOp:
    """One operation: the values that it reads and makes."""

    name: str  # without its overload: `aten.convolution`
    packet: Any  # the operation that it is a variant of, see `functional_packet`
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    overwrites: tuple[int, ...]  # of the inputs: those in whose place an output is written
    scalars: tuple[float, ...]  # see `OpCall.scalars`
    calls: tuple[int, ...]  # indices of the running module calls, outermost first
    source: str  # file:line of the model's own code
    addition: CallKey | None  # of the function that calls it, if that is an addition


@dataclass
class ModuleCall:
    """One call of a module: the operations inside it, and the values that it is given and returns."""

    name: str
    parent: int  # index of the call that it is made in; -1: of none
    first: int  # index of the first operation inside the call
    arguments: tuple[int | None, ...]  # the positional ones; None where one is no tensor
    keywords: tuple[int | None, ...]  # the keyword arguments, likewise
    end: int = 0  # index after the last operation
    output: Any = None  # what was returned, with values in place of tensors and OTHER in place of what is not None


@dataclass
class DataFlow:
    """The operations and module calls of one forward pass, in order."""

    ops: list[FlowOp] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    kinds: list[tuple[tuple[int, ...], torch.dtype]] = field(default_factory=list)  # shape and type of each value
    producers: dict[int, int] = field(default_factory=dict)  # value -> index of the operation that makes it
    inputs: set[int] = field(default_factory=set)  # values that the network is given
    state: dict[str, int] = field(default_factory=dict)  # parameter or buffer -> its value at the start
    outputs: set[int] = field(default_factory=set)  # returned and counting, written to its state, or leaving torch

    def call_counts(self) -> Counter[str]:
        """Count the calls of each module."""
        return Counter(call.name for call in self.calls)


def record_dataflow(
    model: nn.Module, inputs: Sequence[Any], *, is_meta: bool, outputs: OutputChoice | None = None
) -> DataFlow:
    """Run a network in evaluation mode and record its data flow.

    Args:
        model: the network; it is left as it was.
        inputs: its positional arguments.
        is_meta: True if both are on the meta device.
        outputs: those of its outputs that count; None: all.
    """
    recorder = _Recorder(model, inputs, is_meta=is_meta)
    with torch.no_grad(), evaluating(model), calling_eagerly(model), recorder.following(model):
        returned = recorder.run_model(model, inputs)
    recorder.flow.outputs.update(map(recorder.value_of, tensors_in(choose_outputs(returned, outputs))))
    return recorder.flow


class _Recorder(OpObserver):
    """The dispatch mode under which the data flow is recorded."""

    def __init__(self, model: nn.Module, inputs: Sequence[Any], *, is_meta: bool) -> None:
        super().__init__(is_meta=is_meta)
        self.flow = DataFlow()
        self._values = WeakTensorDict[int]()
        self._memory = WeakTensorDict[int]()  # the same number for tensors that share memory
        self._sharing: dict[int, list[ref[Tensor]]] = {}  # that number -> its tensors
        self._running: list[int] = []  # indices of the running module calls
        self._additions = FunctionCallTracker()
        self._addition: CallKey | None = None  # that is running
        self.flow.state = {name: self.value_of(tensor) for name, tensor in named_state(model)}
        self._state = {self._memory_of(tensor) for _, tensor in named_state(model)}
        self.flow.inputs.update(self.value_of(leaf) for leaf in tree_leaves(list(inputs)) if isinstance(leaf, Tensor))

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Follow the calls of modules by hooks, and of additions by a function mode."""
        hooks = []
        for name, module in modules_by_name(model):
            hooks.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            with self._additions.hooked_into(model), _AdditionMode(self._around_addition):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            arguments, keywords = (
                tuple(self.value_of(one) if isinstance(one, Tensor) else None for one in given)
                for given in (args, kwargs.values())
            )
            parent = self._running[-1] if self._running else -1
            self._running.append(len(self.flow.calls))
            self.flow.calls.append(ModuleCall(name, parent, len(self.flow.ops), arguments, keywords))

        return enter

    def _leave(self, _: nn.Module, __: Any, output: Any) -> None:
        call = self.flow.calls[self._running.pop()]
        call.end, call.output = len(self.flow.ops), self._described(output)

    def _described(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self.value_of(output)
        if type(output) in (tuple, list):
            return tuple(map(self._described, output))
        return None if output is None else OTHER

    @contextmanager
    def _around_addition(self) -> Iterator[None]:
        self._addition = self._additions.next_key()
        try:
            yield
        finally:
            self._addition = None

    def on_leaving(self, tensor: Tensor) -> None:
        """Note a value that leaves torch: whoever gets it may use it in any way."""
        self.flow.outputs.add(self.value_of(tensor))

    def on_alias(self, tensor: Tensor, alias: Tensor) -> None:
        """Give the value of `tensor` to another that stands for it."""
        self._values[alias] = self.value_of(tensor)
        self._remember_memory(alias, tensor)

    def on_op(self, call: OpCall) -> None:
        """Record one operation that has run."""
        given = [*call.tensors, *call.given_results]
        written = _written(call)
        if not written and all(any(result is one for one in given) for result in call.results):
            return  # it computes nothing, such as a recurrent layer that is reported before its steps
        read = [] if call.packet in _VALUELESS else given
        inputs, overwrites = tuple(map(self.value_of, read)), tuple(map(self.value_of, written))
        for result in call.results:
            if not any(result is one for one in written):
                self._remember_memory(result, given[0] if given and (written or _returns_view(call)) else None)
                self._values[result] = self._new_value(result)
        for tensor in written:
            if self._memory_of(tensor) in self._state:
                self.flow.outputs.add(len(self.flow.kinds))
            self._values[tensor] = self._new_value(tensor)
        outputs = tuple(map(self.value_of, [*call.results, *written]))
        self._append(call.name, call.packet, inputs, tuple(dict.fromkeys(outputs)), overwrites, call.scalars)
        for tensor in written:
            self._renew_sharing(tensor)

    def _renew_sharing(self, written: Tensor) -> None:
        """Give a new value to every other tensor that shares memory with one that was overwritten."""
        for entry in self._sharing[self._memory_of(written)]:
            tensor = entry()
            if tensor is not None and tensor is not written:
                inputs = self.value_of(tensor), self.value_of(written)
                self._values[tensor] = self._new_value(tensor)
                self._append("shared memory", None, inputs, (self.value_of(tensor),), inputs[:1], ())

    def _append(
        self,
        name: str,
        packet: Any,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        overwrites: tuple[int, ...],
        scalars: tuple[float, ...],
    ) -> None:
        addition = self._addition if packet is aten.add else None
        self.flow.producers.update(dict.fromkeys(outputs, len(self.flow.ops)))
        self.flow.ops.append(
            FlowOp(name, packet, inputs, outputs, overwrites, scalars, tuple(self._running), source_line(), addition)
        )

    def value_of(self, tensor: Tensor) -> int:
        """Return the number of a tensor's present value; one that was never seen gets a new one."""
        value = self._values.get(tensor)
        if value is None:
            self._remember_memory(tensor, None)
            value = self._values[tensor] = self._new_value(tensor)
        return value

    def _new_value(self, tensor: Tensor) -> int:
        self.flow.kinds.append((tuple(tensor.shape), tensor.dtype))
        return len(self.flow.kinds) - 1

    def _memory_of(self, tensor: Tensor) -> int:
        self.value_of(tensor)
        memory = self._memory.get(tensor)
        assert memory is not None
        return memory

    def _remember_memory(self, tensor: Tensor, shared_with: Tensor | None) -> None:
        memory = len(self._sharing) if shared_with is None else self._memory_of(shared_with)
        self._memory[tensor] = memory
        self._sharing.setdefault(memory, []).append(ref(tensor))


def _written(call: OpCall) -> list[Tensor]:
    """List the tensors that an operation writes into, each once."""
    found: list[Tensor] = []
    for argument in call.op._schema.arguments:
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = call.kwargs.get(argument.name) if argument.is_out else call.arguments.get(argument.name)
        for tensor in given if isinstance(given, list | tuple) else [given]:
            if isinstance(tensor, Tensor) and not any(tensor is one for one in found):
                found.append(tensor)
    return found


def _returns_view(call: OpCall) -> bool:
    """Test whether the results of an operation share memory with its first argument."""
    return any(one.alias_info is not None and not one.alias_info.is_write for one in call.op._schema.returns)


class _AdditionMode(TorchFunctionMode):
    """A function mode that runs every addition inside a context."""

    def __init__(self, around_addition: Callable[[], Any]) -> None:
        super().__init__()
        self._around_addition = around_addition

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one torch function; called by torch for each of them."""
        if func not in ADDITION_FUNCTIONS:
            return func(*args, **(kwargs or {}))
        with self._around_addition():
            return func(*args, **(kwargs or {}))
