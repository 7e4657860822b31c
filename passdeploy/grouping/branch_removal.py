"""Choose what a slim network has in place of the modules of a branch, so that nothing of the branch is left to compute.

Where a module computes `h(x + f(x))` and no more, it gives way as a whole: to nothing, or to a ReLU. Where the branch
is a part of a module's own code, that code stays and the modules that it calls give way: to a zero of one element, or,
where the code reshapes what it gets, to their own input, with a zero at the end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any

import torch
from torch import nn

from passdeploy.channels.blocks import Replacement
from passdeploy.grouping.residual_branches import Branch, BranchFinder
from passdeploy.tracing.dataflow import DataFlow, FlowOp, ModuleCall
from passdeploy.tracing.op_call import aten

# Element-wise operations of which zero, or a product with zero, is zero again.
_ODD = {aten.relu, aten.gelu, aten.silu, aten.tanh, aten.hardswish, aten.mish, aten.elu, aten.leaky_relu, aten.neg}
_COPIES = {aten.clone, aten._to_copy, aten.detach, aten.alias}
_ZERO_KEEPING = {*_ODD, *_COPIES, aten.hardtanh}
_SUMS = {aten.add, aten.sub}
_PERMUTATIONS = {aten.permute, aten.transpose, aten.t, aten.unsqueeze}
_MOVEMENTS = {
    *_PERMUTATIONS,
    *(aten.view, aten._unsafe_view, aten._reshape_alias, aten.squeeze, aten.expand, aten.slice, aten.select),
    *(aten.roll, aten.flip, aten.index, aten.as_strided),
}
_WITH_MACS = {
    *(aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.scaled_dot_product_attention, aten.einsum),
}
_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _Left(Enum):
    """Remainder of a value when the modules of a branch have given way."""

    WHOLE = auto()  # it is what it was
    STAND_IN = auto()  # something else of its shape
    SMALL = auto()  # something that broadcasts to its shape
    SMALL_ZERO = auto()  # zeros that broadcast to its shape
    ZERO = auto()  # zeros of its shape


_Choice = tuple[str, _Left]  # a substitute, and what it leaves
_ZERO: _Choice = ("zero", _Left.SMALL_ZERO)
_FIRST: _Choice = ("first", _Left.STAND_IN)
_ZEROS: _Choice = ("zeros", _Left.ZERO)


@dataclass(frozen=True)
class _Part:
    """A call of a module that may give way."""

    call: ModuleCall
    argument: int  # the first tensor that it is called with
    output: int  # the tensor that it returns, alone or first
    entries: int  # of the tuple that it returns; 0: a tensor


class BranchRemover:
    """Chooser of replacements for the branches of one network.

    Args:
        model: the network.
        flow: its data flow.
        finder: of its branches.
    """

    def __init__(self, model: nn.Module, flow: DataFlow, finder: BranchFinder) -> None:
        self._flow, self._is_live, self._counts = flow, finder.is_live, flow.call_counts()
        self._modules = dict(model.named_modules())
        self._shared = _modules_with_shared_tensors(model)
        self._overwritten = {value for op in flow.ops for value in op.overwrites}

    def replacements(self, branch: Branch) -> tuple[Replacement, ...] | str:
        """Return what takes the place of the branch's modules, or why nothing can."""
        found = self._replacements(branch)
        return (not isinstance(found, str) and self._why_needed(found)) or found

    def _replacements(self, branch: Branch) -> tuple[Replacement, ...] | str:
        if (whole := self._whole_module(branch)) is not None:
            return (whole,)
        parts = self._parts(branch)
        if not parts:
            return self._why_no_parts(branch)
        names = {part.call.name for part in parts}
        left_over = [index for index in sorted(branch.path) if not self._is_inside_of(index, names)]
        if any(self._flow.ops[index].packet in _WITH_MACS for index in left_over):
            return f"{self._owner(branch)} computes layers of its branch itself, by functions"
        for choices in self._choices(parts, branch, left_over):
            if self._contributes_nothing(branch, parts, choices, left_over):
                return tuple(
                    Replacement(
                        part.call.name,
                        by,  # type: ignore[arg-type]
                        len(self._flow.kinds[part.output][0]) if by == "zero" else 0,
                        part.entries,
                    )
                    for part, (by, _) in zip(parts, choices, strict=True)
                )
        return f"{self._owner(branch)} computes with its branch in a way that zeros do not pass through"

    def _why_needed(self, replacements: Sequence[Replacement]) -> str:
        """Return why the tensors of the replaced modules cannot go: an operation outside of these reads one."""
        names = {one.module for one in replacements}
        inside = tuple(f"{name}." for name in names)
        gone = {value: name for name, value in self._flow.state.items() if name.startswith(inside)}
        for index, op in enumerate(self._flow.ops):
            read = [gone[value] for value in op.inputs if value in gone]
            if read and not self._is_inside_of(index, names):
                return f"{op.name} at {op.source} computes with {read[0]}"
        return ""

    def chains(self, branch: Branch, branches: Mapping[Branch, Collection[str]]) -> tuple[Replacement, ...]:
        """Return what takes the place of modules that compute nothing but branches, once all of these are left out.

        The modules are those around `branch`, from the inside out.

        Args:
            branch: one of the branches inside that module.
            branches: all that can be left out, each with the tensors that go with it.
        """
        flow, found = self._flow, list[Replacement]()
        for call in (flow.calls[number] for number in reversed(flow.ops[branch.joining].calls)):
            inside = [one for one in branches if call.first <= one.joining < call.end]
            sums = {one.input: flow.ops[one.joining].outputs[0] for one in inside}
            value = call.arguments[0] if call.arguments else None
            while value in sums and value != call.output:
                value = sums[value]
            if not call.name or value is None or value != call.output or value == call.arguments[0]:
                continue
            live = {index for index in range(call.first, call.end) if self._is_live[index]}
            needed = live.difference(*(one.region | {one.joining} for one in inside))
            is_overwritten = {call.arguments[0], call.output} & self._overwritten
            own = (name for name in flow.state if name.startswith(f"{call.name}."))
            is_left = not {name for one in inside for name in branches[one]}.issuperset(own)
            if needed or is_left or is_overwritten or self._why_fixed(call.name):
                continue
            takes_one = len(call.arguments) == 1 and not call.keywords
            found.append(Replacement(call.name, "identity" if takes_one else "first"))
        return tuple(found)

    def _owner(self, branch: Branch) -> str:
        """Name the module whose code adds the branch."""
        return self._flow.calls[self._flow.ops[branch.joining].calls[-1]].name or "the network"

    def _why_no_parts(self, branch: Branch) -> str:
        running = sorted({number for index in branch.path for number in self._flow.ops[index].calls})
        for call in (self._flow.calls[number] for number in running):
            if self._is_within(call, branch) and (reason := self._why_fixed(call.name)):
                return reason
        return f"{self._owner(branch)} computes its branch itself, by functions"

    def _why_fixed(self, name: str) -> str:
        """Return why a module cannot be replaced, or ""."""
        if self._counts[name] != 1:
            return f"{name} runs {self._counts[name]} times"
        if name in self._shared:
            return f"{name} shares a tensor with a layer outside of it"
        inside = (part for key, part in self._modules.items() if key == name or key.startswith(name + "."))
        if any(_has_hooks(part) for part in inside):
            return f"{name} has a hook"
        return ""

    # A module that computes nothing but the block

    def _whole_module(self, branch: Branch) -> Replacement | None:
        flow = self._flow
        for number in reversed(flow.ops[branch.joining].calls):
            call = flow.calls[number]
            if not call.name or self._why_fixed(call.name) or call.arguments[:1] != (branch.input,):
                continue
            after = self._after_sum(branch, call)
            if after is None:
                continue
            inside = {index for index in range(call.first, call.end) if self._is_live[index]}
            allowed = branch.region | {branch.joining, *after}
            if not (branch.path <= inside <= allowed):
                continue
            is_relu = bool(after) and flow.ops[flow.producers.get(branch.input, 0)].packet is not aten.relu
            if not is_relu and {branch.input, call.output} & self._overwritten:
                continue  # what is written into the output would be written into the input
            takes_one = len(call.arguments) == 1 and not call.keywords
            if takes_one or not is_relu:
                return Replacement(call.name, "relu" if is_relu else "identity" if takes_one else "first")
        return None

    def _after_sum(self, branch: Branch, call: ModuleCall) -> list[int] | None:
        """Return the operation between the sum and the call's output: none or a ReLU; None if it is anything else."""
        flow, total = self._flow, self._flow.ops[branch.joining].outputs[0]
        if call.output == total:
            return []
        last = flow.producers.get(call.output, -1) if isinstance(call.output, int) else -1
        is_relu = call.first <= last < call.end and flow.ops[last].packet is aten.relu
        return [last] if is_relu and flow.ops[last].inputs[:1] == (total,) else None

    # Modules that a module's own code calls

    def _parts(self, branch: Branch) -> list[_Part]:
        """Return the outermost calls inside the branch that may give way, in order."""
        found: list[_Part] = []
        chosen: set[int] = set()
        for number, call in enumerate(self._flow.calls):
            if call.parent in chosen:
                chosen.add(number)
                continue
            if (part := self._part_of(call, branch)) is not None:
                chosen.add(number)
                found.append(part)
        return found

    def _part_of(self, call: ModuleCall, branch: Branch) -> _Part | None:
        given = [value for value in (*call.arguments, *call.keywords) if value is not None]
        output, entries = call.output, 0
        if isinstance(output, tuple) and output:
            output, *others = output
            if any(one is not None and not self._is_unused(one) for one in others):
                return None
            entries = 1 + len(others)
        if not call.name or not given or not isinstance(output, int) or not self._is_within(call, branch):
            return None
        return None if self._why_fixed(call.name) else _Part(call, given[0], output, entries)

    def _is_unused(self, value: object) -> bool:
        return (
            isinstance(value, int)
            and not any(value in op.inputs for op in self._flow.ops)
            and value not in self._flow.outputs
        )

    def _is_within(self, call: ModuleCall, branch: Branch) -> bool:
        """Test whether a call does nothing but work for the branch; one that does nothing hands on a part of it."""
        live = [index for index in range(call.first, call.end) if self._is_live[index]]
        if not live:
            return isinstance(call.output, int) and self._flow.producers.get(call.output, -1) in branch.path
        return branch.region.issuperset(live) and not branch.path.isdisjoint(live)

    def _is_inside_of(self, index: int, names: set[str]) -> bool:
        return any(self._flow.calls[call].name in names for call in self._flow.ops[index].calls)

    def _choices(self, parts: Sequence[_Part], branch: Branch, left_over: Sequence[int]) -> Iterator[list[_Choice]]:
        """Yield ways to replace the parts: what leaves least to compute first."""
        is_in_place = branch.output in self._flow.ops[branch.joining].overwrites
        before = [_FIRST] * (len(parts) - 1)
        if not is_in_place:
            ways = [[*before, _ZERO], [_ZERO] * len(parts)]  # handing a tensor on takes no kernel, a zero takes one
            yield from reversed(ways) if left_over else ways
        if self._flow.kinds[parts[-1].argument] == self._flow.kinds[parts[-1].output]:
            yield [*before, _ZEROS]

    def _contributes_nothing(
        self, branch: Branch, parts: Sequence[_Part], choices: Sequence[_Choice], left_over: Sequence[int]
    ) -> bool:
        """Test whether the code that is left runs on what the replaced modules return, and makes the branch zero."""
        known: dict[int, _Left] = {}
        pending = sorted(zip(parts, choices, strict=True), key=lambda item: item[0].call.first)
        for index in left_over:
            while pending and pending[0][0].call.end <= index:
                part, (_, known[part.output]) = pending.pop(0)
            op = self._flow.ops[index]
            given = [known.get(value, _Left.WHOLE) for value in op.inputs]
            left = _left_of(op, given, [self._is_scalar(value) for value in op.inputs])
            if left is None:
                return False
            known.update(dict.fromkeys(op.outputs, left))
        known.update({part.output: left for part, (_, left) in pending})
        is_in_place = branch.output in self._flow.ops[branch.joining].overwrites
        allowed = {_Left.ZERO} if is_in_place else {_Left.ZERO, _Left.SMALL_ZERO}
        return known.get(branch.output) in allowed

    def _is_scalar(self, value: int) -> bool:
        return all(size == 1 for size in self._flow.kinds[value][0])


def _left_of(op: FlowOp, given: Sequence[_Left], is_scalar: Sequence[bool]) -> _Left | None:
    """Return what is left of an operation's result; None if it may fail, or change what the block is given.

    Args:
        op: the operation.
        given: what is left of each of its inputs.
        is_scalar: for each input, whether it has one element.
    """
    if all(left is _Left.WHOLE for left in given):
        return _Left.WHOLE
    if op.packet is None:  # a tensor that shares memory with one that is overwritten
        return None
    if op.overwrites and not _can_be_overwritten(op, given, is_scalar):
        return None
    small, zero = {_Left.SMALL, _Left.SMALL_ZERO}, {_Left.SMALL_ZERO, _Left.ZERO}
    is_zero = (
        (op.packet in _ZERO_KEEPING and given[0] in zero)
        or (op.packet is aten.mul and not zero.isdisjoint(given))
        or (op.packet is aten.div and given[0] in zero)
        or (op.packet in _SUMS and len(given) > 1 and zero.issuperset(given))  # else a number is added
        or (op.packet in _MOVEMENTS and given[0] is _Left.ZERO)
        or (op.packet in _PERMUTATIONS and given[0] in zero)
    )
    is_pointwise = op.packet in _COPIES | _PERMUTATIONS or _is_pointwise(op.packet)
    if not is_pointwise and not small.isdisjoint(given):
        return None
    is_large = _Left.ZERO in given or _Left.STAND_IN in given or not is_pointwise
    if is_zero:
        return _Left.ZERO if is_large else _Left.SMALL_ZERO
    return _Left.STAND_IN if is_large else _Left.SMALL


def _can_be_overwritten(op: FlowOp, given: Sequence[_Left], is_scalar: Sequence[bool]) -> bool:
    """Test whether an operation in place finds a tensor that is not the block's input, and large enough."""
    own = given[0]
    if op.overwrites != op.inputs[:1] or own in (_Left.WHOLE, _Left.STAND_IN):
        return False
    others = zip(given[1:], is_scalar[1:], strict=True)
    return own is _Left.ZERO or all(left in (_Left.SMALL, _Left.SMALL_ZERO) or single for left, single in others)


@cache
def _is_pointwise(packet: Any) -> bool:
    return torch.Tag.pointwise in getattr(packet, packet.overloads()[0]).tags


def _has_hooks(module: nn.Module) -> bool:
    return any(vars(module).get(table) for table in _HOOK_TABLES)


def _modules_with_shared_tensors(model: nn.Module) -> set[str]:
    """Name the modules of which a tensor has a name outside of them as well."""
    names: dict[int, list[str]] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        names.setdefault(id(tensor), []).append(name)
    found: set[str] = set()
    for own in names.values():
        for name in own if len(own) > 1 else ():
            parts = name.split(".")
            prefixes = (".".join(parts[:count]) for count in range(1, len(parts)))
            found.update(prefix for prefix in prefixes if not all(one.startswith(prefix + ".") for one in own))
    return found
