"""One call of a tensor operation: its name, its arguments by the schema's names, and its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

aten = torch.ops.aten

# Of arithmetic, integer arguments enter the computation; of other operations they are sizes and dimensions.
_WITH_INT_SCALARS = ("aten.mul", "aten.mul_", "aten.div", "aten.div_", "aten.pow", "aten.add", "aten.sub", "aten.rsub")


Value = TypeVar("Value")


class _CachedProperty(Generic[Value]):
    """A cached property without the lock of `functools.cached_property`, slower in Python 3.11 than the values."""

    def __init__(self, value_of: Callable[[Any], Value]) -> None:
        self._value_of, self._name = value_of, value_of.__name__
        self.__doc__ = value_of.__doc__

    def __get__(self, owner: Any, kind: type | None = None) -> Value:
        value: Value = self._value_of(owner)
        owner.__dict__[self._name] = value  # an instance attribute hides this descriptor from now on
        return value


class OpCall:
    """One call of a tensor operation; `call["weight"]` is the argument of that name in the operator's schema.

    Args:
        op: the operator, with its overload.
        args: the positional arguments.
        kwargs: the keyword arguments.
        result: what the call returned.
    """

    def __init__(self, op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        self.op, self.args, self.kwargs, self.result = op, args, kwargs, result
        self._schema = _schema_of(op)
        self.name = self._schema.name  # the operation without its overload: `aten.convolution`

    @_CachedProperty
    def arguments(self) -> dict[str, Any]:
        """The arguments by name, in the schema's order, defaults included."""
        named = {}
        for position, (name, has_default, default) in enumerate(self._schema.signature):
            if position < len(self.args):
                named[name] = self.args[position]
            elif name in self.kwargs or has_default:
                named[name] = self.kwargs.get(name, default)
        return named

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @_CachedProperty
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, also those inside lists."""
        return list(_tensors_in(self.arguments.values()))

    @_CachedProperty
    def scalars(self) -> tuple[float, ...]:
        """The numbers that enter the computation: float arguments, and in arithmetic integers as well."""
        types = self._schema.scalar_types
        return tuple(value for value in self.arguments.values() if type(value) in types) if types else ()

    @_CachedProperty
    def results(self) -> list[Tensor]:
        """Every tensor among the results."""
        return list(_tensors_in((self.result,)))


@dataclass(frozen=True)
class _OpSchema:
    """The parts of an operator's schema that its calls share."""

    name: str
    signature: list[tuple[str, bool, Any]]  # of each argument: its name, whether it has a default, and the default
    scalar_types: tuple[type, ...]  # types of numbers that enter the computation; empty where no argument is one


@cache
def _schema_of(op: torch._ops.OpOverload) -> _OpSchema:
    name, arguments = str(op.overloadpacket), op._schema.arguments
    scalar_types: tuple[type, ...] = ()
    if name in _WITH_INT_SCALARS:
        scalar_types = (int, float)
    elif any(kind in str(argument.type) for argument in arguments for kind in ("float", "number")):
        scalar_types = (float,)
    signature = [(argument.name, argument.has_default_value(), argument.default_value) for argument in arguments]
    return _OpSchema(name, signature, scalar_types)


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among values, also those inside lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)
