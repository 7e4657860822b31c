"""Rebind functions stored on modules (a replaced `forward`, hooks) to a copy of the network.

`copy.deepcopy` copies bound methods and partials along with what they are bound to, but takes functions as they are:
one that closes over a layer still runs that layer in every copy of the network.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator, Mapping
from dis import get_instructions
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ref

from torch import Tensor, nn

from passdeploy.errors import ModelError

_MOST_VISITED = 2_000  # values behind one function: an object that holds more holds data
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, ModuleType)


def attributes_to_rebind(
    model: nn.Module, attributes: Iterable[tuple[nn.Module, str, Any]]
) -> list[tuple[nn.Module, str]]:
    """List the attributes that hold functions or weak references which must be rebound in a copy of `model`.

    Args:
        model: the network.
        attributes: (module, name of the attribute, its value), of modules of the network.

    Raises:
        ModelError: a function reaches the network in a way that cannot be rebound: through a global variable, the
            default of an argument, or another object that it closes over.
    """
    found: list[tuple[nn.Module, str]] = []
    own: frozenset[int] | None = None
    for module, attribute, value in attributes:
        functions = list(_functions_in(value))
        if not functions and not isinstance(value, ref):
            continue
        own = own or frozenset(map(id, [*model.modules(), *model.parameters(), *model.buffers()]))
        for function in functions:
            if (what := _obstacle(function, own)) is not None:
                name = next(name for name, part in model.named_modules() if part is module)
                raise ModelError(
                    f"{name + '.' if name else ''}{attribute} holds {function.__qualname__}, which uses this very "
                    f"network through {what}: a copy of the network would still run the original.\n"
                    "Let the function take the module as its argument (hooks and types.MethodType pass it), "
                    "or write a subclass with that forward."
                )
        if any(_closes_over(function, own) for function in functions) or (
            isinstance(value, ref) and id(value()) in own
        ):
            found.append((module, attribute))
    return found


def copy_attribute(value: Any, memo: dict[int, Any]) -> Any:
    """Copy as `copy.deepcopy` does, with functions rebound to the copies in `memo` (id of an original -> its copy)."""
    if isinstance(value, ref):
        return ref(memo[id(value())])
    for function in _functions_in(value):
        if id(function) not in memo and _closes_over(function, memo):
            memo[id(function)] = _rebound(function, memo)
    return _copied(value, memo)


def rebind_to_tensors_(model: nn.Module, tensors: Mapping[int, Tensor]) -> None:
    """Let functions that close over tensors of `model` use others (id of an old tensor -> the new one)."""
    memo: dict[int, Any] = {**tensors, **{id(module): module for module in model.modules()}}
    for module in model.modules():
        for attribute, value in list(vars(module).items()):
            if any(_closes_over(function, tensors) for function in _functions_in(value)):
                vars(module)[attribute] = copy_attribute(value, memo)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copy a value that may hold functions; `copy.deepcopy` of newer Pythons takes those without a look at `memo`."""
    if isinstance(value, FunctionType):
        return memo.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(_copied(value.__func__, memo), copy.deepcopy(value.__self__, memo))
    if type(value) is partial:
        parts = (_copied(part, memo) for part in value.args)
        return partial(_copied(value.func, memo), *parts, **{k: _copied(v, memo) for k, v in value.keywords.items()})
    if isinstance(value, dict) and any(callable(held) for held in value.values()):
        new = memo[id(value)] = type(value)()
        new.update((key, _copied(held, memo)) for key, held in value.items())
        return new
    if type(value) in (list, tuple) and any(callable(held) for held in value):
        return type(value)(_copied(held, memo) for held in value)
    return copy.deepcopy(value, memo)


def _functions_in(value: Any) -> Iterator[FunctionType]:
    """Yield the plain functions that an attribute holds: itself, under a method or partial, or in a container."""
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, MethodType):
        yield from _functions_in(value.__func__)
    elif isinstance(value, partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _functions_in(part)
    elif isinstance(value, Mapping):
        for held in value.values():
            yield from _functions_in(held)
    elif isinstance(value, list | tuple) and len(value) < _MOST_VISITED:
        for held in value:
            yield from _functions_in(held)


def _closes_over(function: FunctionType, memo: Container[int]) -> bool:
    return any(_is_replaced(content, memo) for _, content in _cells(function))


def _is_replaced(content: Any, memo: Container[int]) -> bool:
    """True where a cell of a closure must hold something else in the copy."""
    if isinstance(content, FunctionType):
        return _closes_over(content, memo)
    if isinstance(content, MethodType):
        return id(content.__self__) in memo or _is_replaced(content.__func__, memo)
    return isinstance(content, nn.Module | Tensor) and id(content) in memo


def _rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """Copy a function with cells that hold the copies of what it closes over."""
    cells = tuple(
        CellType(_copied_content(content, memo)) if is_set else CellType() for is_set, content in _cells(function)
    )
    new = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    new.__kwdefaults__ = function.__kwdefaults__
    new.__dict__.update({key: held for key, held in vars(function).items() if key != "__wrapped__"})
    new.__qualname__, new.__doc__, new.__module__ = function.__qualname__, function.__doc__, function.__module__
    return new


def _copied_content(content: Any, memo: dict[int, Any]) -> Any:
    if not _is_replaced(content, memo):
        return content  # shared, as every function shares it with its copies
    if isinstance(content, FunctionType):
        return _rebound(content, memo)
    if isinstance(content, MethodType):
        return MethodType(_copied_content(content.__func__, memo), copy.deepcopy(content.__self__, memo))
    return memo[id(content)]


def _cells(function: FunctionType) -> list[tuple[bool, Any]]:
    """List whether each cell of a closure is set, and what it holds."""
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append((True, cell.cell_contents))
        except ValueError:  # not set yet
            found.append((False, None))
    return found


# What cannot be rebound


def _obstacle(function: FunctionType, own: frozenset[int]) -> str | None:
    """Describe the way, other than a plain closure, on which a function reaches the network; None if there is none."""
    seen: set[int] = set()
    for is_set, content in _cells(function):
        if isinstance(content, FunctionType):
            if (what := _obstacle(content, own)) is not None:
                return what
        elif isinstance(content, MethodType):
            if (what := _obstacle_in_method(content, own)) is not None:
                return what
        elif is_set and id(content) not in own and _reaches(content, own, seen):
            return f"an object of {type(content).__name__} that it closes over"
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if any(_reaches(value, own, seen) for value in defaults):
        return "the default of an argument"
    for name in _global_names(function.__code__):
        if _reaches(function.__globals__.get(name), own, seen):
            return f"the global variable {name!r}"
    return None


def _obstacle_in_method(method: MethodType, own: frozenset[int]) -> str | None:
    if id(method.__self__) not in own and _reaches(method.__self__, own, set()):
        return f"an object of {type(method.__self__).__name__} that it closes over"
    return _obstacle(method.__func__, own) if isinstance(method.__func__, FunctionType) else None


@lru_cache(maxsize=4096)  # a code never changes, and every copy of a network asks for the same ones again
def _global_names(code: CodeType) -> frozenset[str]:
    own = {str(step.argval) for step in get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    nested = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(own).union(*map(_global_names, nested))


def _reaches(value: Any, own: frozenset[int], seen: set[int]) -> bool:
    """Search a value, and what it holds, for a module or tensor of the network."""
    waiting = [value]
    while waiting and len(seen) < _MOST_VISITED:
        held = waiting.pop()
        if id(held) in own:
            return True
        if id(held) in seen or isinstance(held, (*_PLAIN, Tensor)):
            continue
        seen.add(id(held))
        waiting += _held_by(held, own)
    return False


def _held_by(value: Any, own: frozenset[int]) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())[:_MOST_VISITED]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)[:_MOST_VISITED]
    if isinstance(value, ref):
        return [value()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType):
        return [content for is_set, content in _cells(value) if is_set] + [
            value.__globals__[name] for name in _global_names(value.__code__) if name in value.__globals__
        ]
    return list(vars(value).values()) if hasattr(value, "__dict__") else []
