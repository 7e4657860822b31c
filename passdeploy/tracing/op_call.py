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
_WITH_INT_SCALARS = (aten.mul, aten.div, aten.pow, aten.add, aten.sub, aten.rsub)


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


@cache
def functional_packet(op: torch._ops.OpOverload) -> torch._ops.OpOverloadPacket[Any, Any]:
    """Return the operation that `op` is a variant of: `relu` for `relu_` and `relu.out`, `permute` for `permute_copy`.

    An operation that has no such counterpart is returned itself, without its overload.
    """
    name = op.overloadpacket.__name__
    plain = name.removesuffix("_copy") if torch.Tag.view_copy in op.tags else name.removesuffix("_")
    packet: torch._ops.OpOverloadPacket[Any, Any] = op.overloadpacket
    return getattr(getattr(torch.ops, op.namespace), plain, packet) if plain else packet


class OpCall:
    """One call of a tensor operation; `call["weight"]` is the argument of that name in the operator's schema.

    Tensors given as `out=` are no arguments here: an operation writes its results there, whatever they held.

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
        self.packet = self._schema.packet  # the operation that it is a variant of, see `functional_packet`

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

    @property
    def given_results(self) -> list[Tensor]:
        """The tensors given as `out=`, into which the results were written."""
        return [self.kwargs[name] for name in self._schema.out_names if name in self.kwargs]

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
    packet: torch._ops.OpOverloadPacket[Any, Any]
    out_names: list[str]  # of the tensors into which an `out=` overload writes its results
    signature: list[tuple[str, bool, Any]]  # of each argument: its name, whether it has a default, and the default
    scalar_types: tuple[type, ...]  # types of numbers that enter the computation; empty where no argument is one


@cache
def _schema_of(op: torch._ops.OpOverload) -> _OpSchema:
    packet = functional_packet(op)
    arguments = [argument for argument in op._schema.arguments if not argument.is_out]
    scalar_types: tuple[type, ...] = ()
    if packet in _WITH_INT_SCALARS:
        scalar_types = (int, float)
    elif any(kind in str(argument.type) for argument in arguments for kind in ("float", "number")):
        scalar_types = (float,)
    signature = [(argument.name, argument.has_default_value(), argument.default_value) for argument in arguments]
    out_names = [argument.name for argument in op._schema.arguments if argument.is_out]
    return _OpSchema(str(op.overloadpacket), packet, out_names, signature, scalar_types)


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among values, also those inside lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)
