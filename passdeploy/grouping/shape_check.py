"""Check every tensor shape of a cut network while it runs, against the shapes that its labels predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from passdeploy.tracing.dispatch import OpObserver, source_line
from passdeploy.tracing.op_call import OpCall
from passdeploy.tracing.trace import OpRecord

ScalarsByLine = dict[tuple[str, str], set[tuple[float, ...]]]  # (operation, file:line) -> scalars it computes with

_STRIDE_OPS = "aten.clone", "aten.as_strided_"  # whether they run depends on strides, not only on sizes
_REPEATS = "aten.expand", "aten.repeat"
_VIEW_OPS = "aten.view", "aten._unsafe_view", "aten._reshape_alias"


@dataclass(frozen=True)
class Stop:
    """The operation at which a cut network stopped, and the error."""

    position: int  # number of operations that ran as predicted
    record: OpRecord  # the operation of the whole network that did not
    error: str


class WrongSizeError(Exception):
    """A tensor of the cut network has another size than its labels predict, or a scalar changed with a width."""


class ShapeChecker(OpObserver):
    """Observer of a cut network that stops it at the first tensor of a wrong size.

    Args:
        op_log: the operations of the whole network.
        size_of: labels of a dimension -> its size after the cut.
        masked_run: for a network whose code branches on values, what its masked copy ran: it tells whether a scalar or
            another operation depends on a width or on a value. None: compare with `op_log`.
        is_meta: True if the network runs on the meta device.
    """

    def __init__(
        self,
        op_log: Sequence[OpRecord],
        size_of: Callable[[Tensor], int],
        *,
        masked_run: OpRecorder | None = None,
        is_meta: bool,
    ) -> None:
        super().__init__(is_meta=is_meta)
        self._op_log, self._size_of, self._masked_run = op_log, size_of, masked_run
        self._scalars = masked_run.scalars if masked_run else None
        self._ops: list[str] = []
        self.position = 0  # number of operations that ran as predicted
        self._failed_position: int | None = None  # where the network first did something else than in the trace
        self._is_in_step = True  # the cut network runs the same operations as the whole one so far

    @property
    def ran_other_operations(self) -> bool:
        """True if the cut network has run other operations than the whole one, as after a branch on a width."""
        return not self._is_in_step and (self._masked_run is None or self._ops != self._masked_run.ops)

    @property
    def expected(self) -> OpRecord:
        """The next operation of the whole network, or the first one that the cut network did not repeat."""
        position = self.position if self._failed_position is None else self._failed_position
        return self._op_log[min(position, len(self._op_log) - 1)]

    def on_op(self, call: OpCall) -> None:
        """Compare one operation with the operation of the whole network in its place.

        Raises:
            WrongSizeError: a result has a wrong size, or a scalar has changed.
        """
        name = call.name
        if self._masked_run:
            self._ops += _without_stride_ops(name)
        if name in _STRIDE_OPS and self.expected.op != name:
            return
        while self.expected.op in _STRIDE_OPS and self.expected.op != name and self.position < len(self._op_log) - 1:
            self.position += 1
        expected = self.expected
        if self._is_in_step and not _is_same_op(expected.op, name):
            self._leave_step()  # torch may choose another kernel for another size
        if self._is_in_step:
            if self._scalars is None and call.scalars != expected.scalars:
                raise WrongSizeError(f"a factor of {expected.scalars} that is now {call.scalars}")
            self._check_shapes(call, expected)
        if call.scalars and (self._scalars is not None or not self._is_in_step):
            self._check_scalars(call)
        self.position += 1

    def _leave_step(self) -> None:
        """See only errors that torch raises from here on; what is computed is compared later."""
        self._is_in_step, self._failed_position = False, self.position

    def _check_shapes(self, call: OpCall, expected: OpRecord) -> None:
        for result, (shape, labels) in zip(call.results, expected.results, strict=False):
            if not labels or result.ndim != len(shape):
                continue
            wanted = [self._size_of(labels[dim]) if dim in labels else size for dim, size in enumerate(shape)]
            if call.name in _REPEATS and wanted == list(shape):
                continue  # a kernel that stays, repeated for as many channels as there are
            if not self.is_meta:
                # Sizes that no cut changes may depend on values, such as the number of boxes of a detector.
                sizes = zip(wanted, shape, result.shape, strict=True)
                wanted = [size if size != whole else actual for size, whole, actual in sizes]
            if list(result.shape) == wanted:
                continue
            if sorted(result.shape) == sorted(wanted) and 1 in (wanted[dim] for dim in labels):
                # `einsum` orders dimensions in another way where one of them has a single channel.
                self._leave_step()
                return
            raise WrongSizeError(f"a tensor of shape {list(result.shape)} where {wanted} should be")

    def _check_scalars(self, call: OpCall) -> None:
        """Compare scalars with those of the same line of code: its position in the op log is not known."""
        line = call.name, source_line()
        if line not in self._scalars_of_whole:
            return
        position, known = self._scalars_of_whole[line]
        if self._scalars is not None:
            known = self._scalars.get(line, known)
        if call.scalars not in known:
            self._failed_position = position
            raise WrongSizeError(f"a factor of {min(known)} that is now {call.scalars}")

    @cached_property
    def _scalars_of_whole(self) -> dict[tuple[str, str], tuple[int, set[tuple[float, ...]]]]:
        """The scalars that each line of code computes with in the whole network, and its first operation with them."""
        by_line: dict[tuple[str, str], tuple[int, set[tuple[float, ...]]]] = {}
        for position, record in enumerate(self._op_log):
            if record.source:
                by_line.setdefault((record.op, record.source), (position, set()))[1].add(record.scalars)
        return by_line


class OpRecorder(OpObserver):
    """Observer that records the operations of a network, and the scalars that every line of code computes with."""

    def __init__(self) -> None:
        super().__init__(is_meta=False)
        self.ops: list[str] = []
        self.scalars: ScalarsByLine = {}

    def on_op(self, call: OpCall) -> None:
        """Record one operation and its scalars."""
        self.ops += _without_stride_ops(call.name)
        if call.scalars:
            self.scalars.setdefault((call.name, source_line()), set()).add(call.scalars)


def _without_stride_ops(op: str) -> list[str]:
    """Return the name of an operation, one for all kinds of views; nothing for those that depend on strides."""
    return [] if op in _STRIDE_OPS else [_VIEW_OPS[0] if op in _VIEW_OPS else op]


def _is_same_op(op: str, other: str) -> bool:
    return op == other or (op in _VIEW_OPS and other in _VIEW_OPS)
