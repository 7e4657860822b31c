"""Numbers that remember the dimensions they were computed from, and every comparison that they take part in.

A comparison is kept as a formula of group widths, so that it can be evaluated for any plan without running a network.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np

from passdeploy.channels.costs import Factor
from passdeploy.tracing.dispatch import owner_of

MAX_DEPTH = 50  # operations in each other; deeper results are plain numbers
MAX_LEFT = 8  # plain numbers of a function that are compared with each other
_FEW = 2  # constants up to this one count dimensions rather than channels
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
        return groups_of(self.left) | groups_of(self.right)


Operand = Formula | Factor | int | float


def _value(operand: Operand, widths: Widths) -> Any:
    if isinstance(operand, int | float):
        return operand
    return operand.value(widths) if isinstance(operand, Formula) else operand.size(widths)  # type: ignore[arg-type]


def groups_of(operand: Operand) -> dict[str, None]:
    """Names of the groups whose widths enter a number, in order."""
    if isinstance(operand, int | float):
        return {}
    return operand.groups if isinstance(operand, Formula) else dict.fromkeys(name for name, _ in operand.spans)


class ComparisonLog:
    """The comparisons that tracked numbers took part in, each once: formulas whose values are the outcomes."""

    def __init__(self) -> None:
        self.comparisons = dict[Formula, None]()
        self.has_reads = False  # the model's code computes with sizes, or gives one to a function
        self.looked_up = dict[Operand, None]()  # in a dictionary or set: what is done for other numbers is not known
        self._frame: FrameType | None = None
        self._left: list[Operand] = []  # numbers that left this frame

    def add(self, comparison: Formula) -> None:
        """Add a comparison."""
        self.comparisons[comparison] = None

    def add_leaving(self, operand: Operand, frame: FrameType) -> None:
        """Note that a function got a plain number for a tracked one, by `len`, `int`, `float` or as part of a tensor.

        Nobody sees what it is compared with then. It may be the numbers that left before, or constants of the code.
        """
        self.has_reads = True
        if self._frame is not frame:
            self._frame, self._left = frame, []
        constants = [each for each in frame.f_code.co_consts if type(each) is int and each > _FEW]
        for other in (*self._left, *constants):
            if other != operand:
                self.add(Formula(operator.eq, other, operand))
                self.add(Formula(operator.lt, other, operand))
        if len(self._left) < MAX_LEFT:
            self._left.append(operand)

    def forget_frame(self) -> None:
        """Let go of the last frame, whose variables may be large."""
        self._frame, self._left = None, []


class TrackedNumber:
    """A number that is used like any other.

    Arithmetic with numbers gives tracked numbers again. A comparison in the model's own code is added to `log`.
    """

    operand: Operand
    log: ComparisonLog
    depth: int

    def __bool__(self) -> bool:
        _remember(self.log, operator.ne, self, 0)
        return bool(plain(self))

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __hash__(self) -> int:
        if is_of_model(sys._getframe(1)):
            self.log.looked_up[self.operand] = None
        return hash(plain(self))

    def __int__(self) -> int:
        self.leave(sys._getframe(1))
        return int(plain(self))

    def __float__(self) -> float:
        self.leave(sys._getframe(1))
        return float(plain(self))

    def leave(self, frame: FrameType) -> None:
        """Note that code in this frame gets a plain number instead, if it is the model's own."""
        if is_of_model(frame):
            self.log.add_leaving(self.operand, frame)


class TrackedSize(TrackedNumber, int):
    """A tracked integer, such as the size of a dimension."""


class TrackedRatio(TrackedNumber, float):
    """A tracked number that is no integer, such as half of a width."""


def track(number: int | float, operand: Operand, log: ComparisonLog, depth: int = 0) -> Any:
    """Track a number that is computed from widths by `operand`, with so many operations in each other."""
    tracked = (TrackedRatio if isinstance(number, float) else TrackedSize)(number)
    tracked.operand, tracked.log, tracked.depth = operand, log, depth
    return tracked


def plain(number: Any) -> Any:
    """Return a number that is not tracked."""
    return float.__pos__(number) if isinstance(number, float) else int.__pos__(number)


def operand_of(number: Any) -> Operand:
    """Return what a number is computed from."""
    return number.operand if isinstance(number, TrackedNumber) else plain(number)


def is_of_model(frame: FrameType) -> bool:
    """True if a frame runs the model's own code."""
    return owner_of(frame.f_code.co_filename)[0] == "model"


def _remember(log: ComparisonLog, operation: Callable[[Any, Any], Any], left: Any, right: Any) -> None:
    if is_of_model(sys._getframe(2)):
        log.add(Formula(operation, operand_of(left), operand_of(right)))


def _compared(kind: type, name: str) -> Callable[[TrackedNumber, Any], Any]:
    operation, untracked = getattr(operator, name), getattr(kind, name)

    def method(self: TrackedNumber, other: Any) -> Any:
        if isinstance(other, int | float):
            _remember(self.log, operation, self, other)
        return untracked(self, other)

    return method


def _computed(
    operation: Callable[[Any, Any], Any], formula_of: Callable[[Any, Any], Any], *, is_reflected: bool = False
) -> Callable[[TrackedNumber, Any], Any]:
    """Make the method of an operation.

    Args:
        operation: of two plain numbers.
        formula_of: the same for NumPy arrays.
        is_reflected: the tracked number is the second one.
    """

    def method(self: TrackedNumber, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        left, right = (other, self) if is_reflected else (self, other)
        result = operation(plain(left), plain(right))
        depth = max(self.depth, getattr(other, "depth", 0)) + 1
        if depth > MAX_DEPTH or not isinstance(result, int | float):  # the root of a negative number
            return result
        self.log.has_reads |= is_of_model(sys._getframe(1))
        return track(result, Formula(formula_of, operand_of(left), operand_of(right)), self.log, depth)

    return method


def _changed(operation: Callable[[Any], Any], formula_of: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Make the method of an operation on one number."""

    def method(self: TrackedNumber, *digits: int) -> Any:
        result = operation(plain(self), *digits)
        if digits or self.depth >= MAX_DEPTH:
            return result
        return track(result, Formula(formula_of, self.operand, 0), self.log, self.depth + 1)

    return method


def _of_first(function: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """Make the operation of a formula from a function of one number; the second operand says nothing."""
    return lambda value, _: function(value)


def _power(base: Any, exponent: Any) -> Any:
    return np.float_power(base, exponent)  # integers have no negative powers in NumPy


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_OF_INTEGERS = ("and", "or", "xor", "lshift", "rshift")
_UNARY: dict[str, tuple[Callable[..., Any], Callable[[Any, Any], Any]]] = {
    "__neg__": (operator.neg, _of_first(np.negative)),
    "__abs__": (abs, _of_first(np.abs)),
    "__floor__": (math.floor, _of_first(np.floor)),
    "__ceil__": (math.ceil, _of_first(np.ceil)),
    "__trunc__": (math.trunc, _of_first(np.trunc)),
    "__round__": (round, _of_first(np.round)),
}
for _kind, _base in ((TrackedSize, int), (TrackedRatio, float)):
    for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
        setattr(_kind, _name, _compared(_base, _name))
    for _name in (*_BINARY, *(_OF_INTEGERS if _base is int else ())):
        _operation = getattr(operator, f"__{_name}__")
        _formula = _power if _name == "pow" else _operation
        setattr(_kind, f"__{_name}__", _computed(_operation, _formula))
        setattr(_kind, f"__r{_name}__", _computed(_operation, _formula, is_reflected=True))
    for _name, (_change, _of_arrays) in _UNARY.items():
        setattr(_kind, _name, _changed(_change, _of_arrays))
