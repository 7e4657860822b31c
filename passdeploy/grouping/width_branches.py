"""Search the code of a network for comparisons of widths, which may come out differently once channels are cut.

A trace shows the operations that ran, not the branches that were not taken: `if self.conv.in_channels != x.shape[1]:`
may be true in the whole network and false in a cut one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dis import get_instructions
from functools import cache
from types import CodeType, FunctionType

from torch import nn

_WIDTHS = {
    *("in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels", "num_groups"),
    *("embedding_dim", "embed_dim", "hidden_size", "input_size", "normalized_shape", "shape", "size", "numel"),
}
_INSTRUCTIONS_BEFORE = 10  # a comparison, in which its operands are loaded


def compares_widths(model: nn.Module) -> bool:
    """True if code of the network, other than torch's own, compares a size of a tensor or layer with anything."""
    return any(_compares_widths(function) for module in model.modules() for function in _functions_of(module))


def _functions_of(module: nn.Module) -> Iterator[FunctionType]:
    yield from _methods_of(type(module).__mro__)
    for value in vars(module).values():
        function = getattr(value, "__func__", value)
        if isinstance(function, FunctionType) and not _is_of_torch(function.__module__):
            yield function


@cache
def _methods_of(classes: tuple[type, ...]) -> tuple[FunctionType, ...]:
    """List the methods of a class that its forward pass may call, with all that they override."""
    methods: dict[str, list[FunctionType]] = {}
    for kind in classes:
        for name, value in vars(kind).items() if not _is_of_torch(kind.__module__) else ():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, FunctionType):
                methods.setdefault(name, []).append(function)
    reached, waiting = set[str](), ["forward", "__call__"]
    while waiting:
        name = waiting.pop()
        if name in methods and name not in reached:
            reached.add(name)
            waiting += [other for method in methods[name] for other in method.__code__.co_names]
    return tuple(method for name in sorted(reached) for method in methods[name])


@cache
def _compares_widths(function: FunctionType) -> bool:
    """True if a function, or one of the same package that it calls, compares a size."""
    seen, waiting = {function}, [function]
    while waiting:
        one = waiting.pop()
        if _compares(one.__code__):
            return True
        called = [one.__globals__.get(name) for name in one.__code__.co_names]
        new = [other for other in called if isinstance(other, FunctionType) and other not in seen]
        new = [other for other in new if other.__module__.partition(".")[0] == one.__module__.partition(".")[0]]
        seen.update(new)
        waiting += [other for other in new if not _is_of_torch(other.__module__)]
    return False


def _is_of_torch(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "builtins")


def _compares(code: CodeType) -> bool:
    before: deque[str] = deque(maxlen=_INSTRUCTIONS_BEFORE)
    variables, last = set[str](), ""  # local variables that were computed from sizes
    for instruction in get_instructions(code):
        # `if width % 8:` compares as well.
        operation, loads_size = instruction.opname, not _WIDTHS.isdisjoint(before)
        is_truth_of_number = last.startswith("BINARY_") and ("JUMP" in operation or operation == "UNARY_NOT")
        if loads_size and (operation in ("COMPARE_OP", "CONTAINS_OP") or is_truth_of_number):
            return True
        last = last if operation == "TO_BOOL" else operation
        name = str(instruction.argval) if operation in ("LOAD_ATTR", "LOAD_METHOD") else ""
        if operation == "STORE_FAST" and loads_size:
            variables.add(instruction.argval)
        elif operation == "LOAD_FAST" and instruction.argval in variables:
            name = "size"
        before.append(name)
    return any(_compares(constant) for constant in code.co_consts if isinstance(constant, CodeType))
