"""One recorded tensor operation: its name, its arguments by the schema's names, and its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

_WITH_INT_SCALARS = ("aten.mul", "aten.mul_", "aten.div", "aten.div_", "aten.pow", "aten.add", "aten.sub", "aten.rsub")


Value = TypeVar("Value")


class _CachedProperty(Generic[Value]):
    """As `functools.cached_property`, whose lock in Python 3.11 takes longer than most of these values."""

    def __init__(self, value_of: Callable[[Any], Value]) -> None:
        self._value_of, self._name = value_of, value_of.__name__
        self.__doc__ = value_of.__doc__

    def __get__(self, owner: Any, kind: type | None = None) -> Value:
        value: Value = self._value_of(owner)
        owner.__dict__[self._name] = value  # found sooner than this from now on
        return value


class OpCall:
    """One tensor operation as it happened: arguments by their schema's names.

    Args:
        op: the operation.
        args: by place.
        kwargs: by name.
        result: what it returned.
    """

    def __init__(self, op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        self.op, self.args, self.kwargs, self.result = op, args, kwargs, result
        self._schema = _schema_of(op)
        self.name = self._schema.name  # the operation without its overload: `aten.convolution`

    @_CachedProperty
    def arguments(self) -> dict[str, Any]:
        """By name, in the schema's order and with its defaults filled in."""
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
        """Every tensor among the arguments, lists included."""
        return list(_tensors_in(self.arguments.values()))

    @_CachedProperty
    def scalars(self) -> tuple[float, ...]:
        """The numbers it computes with: those with a fraction, and in arithmetic whole ones, too."""
        kinds = self._schema.scalars
        return tuple(value for value in self.arguments.values() if type(value) in kinds) if kinds else ()

    @_CachedProperty
    def results(self) -> list[Tensor]:
        """Every tensor among the results."""
        return list(_tensors_in((self.result,)))


@dataclass(frozen=True)
class _OpSchema:
    """What is the same for all calls of an operation."""

    name: str
    signature: list[tuple[str, bool, Any]]  # arguments by name, in order; whether they have a default, and which
    scalars: tuple[type, ...]  # of the arguments that are numbers it computes with; none where no argument can be


@cache
def _schema_of(op: torch._ops.OpOverload) -> _OpSchema:
    name, arguments = str(op.overloadpacket), op._schema.arguments
    scalars: tuple[type, ...] = (int, float) if name in _WITH_INT_SCALARS else ()
    if not scalars and any("float" in str(argument.type) or "number" in str(argument.type) for argument in arguments):
        scalars = (float,)
    return _OpSchema(
        name, [(argument.name, argument.has_default_value(), argument.default_value) for argument in arguments], scalars
    )


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the values of an operation; those may be lists, of lists at the most."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)
