"""Search the code of a network for reads of widths: what it does with one changes once channels are cut.

A trace does not show where a number comes from: a window of `x.shape[1] // 8` pixels becomes another one. Nor does it
show branches that were not taken, so their code is searched as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dis import Instruction, get_instructions
from functools import cache
from types import CodeType, FunctionType

from torch import nn

_WIDTHS = {
    *("in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels", "num_groups"),
    *("embedding_dim", "embed_dim", "hidden_size", "input_size", "normalized_shape", "shape", "size", "numel"),
}
_LOADS = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL"}
_PARAMETERS = {"weight", "bias", "running_mean", "running_var"}  # their first dimension is no batch
_WITHOUT_EFFECT = {"CACHE", "EXTENDED_ARG", "NOP", "NOT_TAKEN", "PRECALL", "PUSH_NULL"}


def reads_widths(model: nn.Module) -> bool:
    """True if code of the network, other than torch's own, reads a size that may be a number of channels.

    The batch (`x.size(0)`) and the size of maps (`x.shape[-2:]`) are none.
    """
    functions = {function for module in model.modules() for function in functions_of(module)}
    return any(_reads_widths(function) for function in functions)


@cache
def _reads_widths(function: FunctionType) -> bool:
    """True if a function, or one of the same package that it calls, reads a size that may be a number of channels."""
    seen, waiting = {function}, [function]
    while waiting:
        one = waiting.pop()
        if _reads(one.__code__):
            return True
        own = _helpers_of(one) - seen
        waiting += own
        seen |= own
    return False


def _helpers_of(function: FunctionType) -> set[FunctionType]:
    """Return the functions of the same package that a function may call, by the global names in its code."""
    called = [function.__globals__.get(name) for name in function.__code__.co_names]
    own = {other for other in called if isinstance(other, FunctionType) and not _is_of_torch(other.__module__)}
    return {other for other in own if other.__module__.partition(".")[0] == function.__module__.partition(".")[0]}


def _reads(code: CodeType) -> bool:
    steps = [one for one in get_instructions(code) if one.opname not in _WITHOUT_EFFECT]
    for place, one in enumerate(steps):
        if one.opname in _LOADS and one.argval in _WIDTHS:
            of_parameter = place > 0 and steps[place - 1].argval in _PARAMETERS
            if of_parameter or not _picks_no_channels(steps[place + 1 : place + 5]):
                return True
        if one.argval == "len" and any(step.argval in _PARAMETERS for step in steps[place + 1 : place + 6]):
            return True
    return any(_reads(constant) for constant in code.co_consts if isinstance(constant, CodeType))


def _picks_no_channels(after: Sequence[Instruction]) -> bool:
    """True if the steps after `x.shape` or `x.size` pick the batch, or height and width."""
    if after and after[0].opname.startswith("CALL") and not after[0].arg:  # `x.size()[2:]`
        after = after[1:]
    if len(after) < 2 or not after[0].opname.startswith("LOAD_"):
        return False
    picked, operation = after[0].argval, after[1].opname
    if isinstance(picked, slice):
        return picked.start in (2, -2)
    if type(picked) is not int:
        return False
    if "SUBSCR" in operation or operation in ("BINARY_OP", "CALL", "CALL_METHOD"):
        return picked == 0
    return picked in (2, -2) and any("SLICE" in one.opname for one in after[2:3])


def functions_of(module: nn.Module) -> tuple[FunctionType, ...]:
    """List the functions, other than torch's own, that a call of a module may run: methods and what replaced them."""
    own = (getattr(value, "__func__", value) for value in vars(module).values())
    replaced = [each for each in own if isinstance(each, FunctionType) and not _is_of_torch(each.__module__)]
    called = frozenset(name for each in replaced for name in each.__code__.co_names)
    return (*_methods_of(type(module).__mro__, called), *replaced)


@cache
def _methods_of(classes: tuple[type, ...], called: frozenset[str]) -> tuple[FunctionType, ...]:
    """List the methods of a class that its forward pass or `called` may call, with all that they override."""
    methods: dict[str, list[FunctionType]] = {}
    for kind in classes:
        for name, value in vars(kind).items() if not _is_of_torch(kind.__module__) else ():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, FunctionType):
                methods.setdefault(name, []).append(function)
    reached, waiting = set[str](), ["forward", "__call__", *called]
    while waiting:
        name = waiting.pop()
        if name in methods and name not in reached:
            reached.add(name)
            waiting += [other for method in methods[name] for other in method.__code__.co_names]
    return tuple(method for name in sorted(reached) for method in methods[name])


def _is_of_torch(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "builtins")
