"""Integers that remember the dimensions they were computed from, and every comparison that they take part in.

A comparison is kept as a formula of group widths, so that it can be evaluated for any plan without running a network.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from passdeploy.channels.costs import Factor
from passdeploy.tracing.dispatch import owner_of

MAX_DEPTH = 50  # operations in each other; deeper results are plain integers
Widths = Mapping[str, "int | np.ndarray"]  # group name -> its width, or several widths to evaluate at once


@dataclass(frozen=True)
class Formula:
    """An arithmetic operation on two numbers, each of them known or computed from widths."""

    operation: Callable[[Any, Any], Any]
    left: Operand
    right: Operand

    def value(self, widths: Widths) -> Any:
        """Compute the result at some widths."""
        return self.operation(_value(self.left, widths), _value(self.right, widths))

    @property
    def groups(self) -> dict[str, None]:
        """Names of the groups whose widths enter, in order."""
        return _groups(self.left) | _groups(self.right)


Operand = Formula | Factor | int


def _value(operand: Operand, widths: Widths) -> Any:
    if isinstance(operand, int):
        return operand
    return operand.value(widths) if isinstance(operand, Formula) else operand.size(widths)  # type: ignore[arg-type]


def _groups(operand: Operand) -> dict[str, None]:
    if isinstance(operand, int):
        return {}
    return operand.groups if isinstance(operand, Formula) else dict.fromkeys(name for name, _ in operand.spans)


class TrackedSize(int):
    """A size that is used like any integer.

    Arithmetic with integers gives tracked sizes again. A comparison in the model's own code is added to `log`, each
    only once: a formula whose value is the outcome.
    """

    operand: Operand
    log: dict[Formula, None]
    depth: int

    @classmethod
    def of(cls, size: int, operand: Operand, log: dict[Formula, None], depth: int = 0) -> TrackedSize:
        """Track a size that is computed from widths by `operand`, with so many operations in each other."""
        tracked = cls(size)
        tracked.operand, tracked.log, tracked.depth = operand, log, depth
        return tracked

    __hash__ = int.__hash__

    def __bool__(self) -> bool:
        _remember(self, operator.ne, self, 0)
        return int(self) != 0


def _operand(value: int) -> Operand:
    return value.operand if isinstance(value, TrackedSize) else int(value)


def _remember(tracked: TrackedSize, operation: Callable[[Any, Any], Any], left: int, right: int) -> None:
    if owner_of(sys._getframe(2).f_code.co_filename)[0] == "model":
        tracked.log[Formula(operation, _operand(left), _operand(right))] = None


def _compared(name: str) -> Callable[[TrackedSize, Any], Any]:
    operation, plain = getattr(operator, name), getattr(int, name)

    def method(self: TrackedSize, other: Any) -> Any:
        if isinstance(other, int):
            _remember(self, operation, self, other)
        return plain(self, other)

    return method


def _computed(name: str, *, is_reflected: bool = False) -> Callable[[TrackedSize, Any], Any]:
    operation = getattr(operator, name)
    plain = getattr(int, f"__r{name[2:]}" if is_reflected else name)

    def method(self: TrackedSize, other: Any) -> Any:
        result = plain(self, other)
        depth = max(self.depth, getattr(other, "depth", 0)) + 1
        if not isinstance(other, int) or depth > MAX_DEPTH:
            return result
        left, right = (other, self) if is_reflected else (self, other)
        return TrackedSize.of(result, Formula(operation, _operand(left), _operand(right)), self.log, depth)

    return method


for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(TrackedSize, _name, _compared(_name))
for _name in ("__add__", "__sub__", "__mul__", "__floordiv__", "__mod__"):
    setattr(TrackedSize, _name, _computed(_name))
    setattr(TrackedSize, f"__r{_name[2:]}", _computed(_name, is_reflected=True))
