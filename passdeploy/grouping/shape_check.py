"""Watch a cut network and stop it where it leaves the script that its walk wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from passdeploy.tracing.dispatch import OpObserver, source_line
from passdeploy.tracing.op_call import OpCall
from passdeploy.tracing.trace import OpRecord

FactorsByLine = dict[tuple[str, str], set[tuple[float, ...]]]  # operation and file:line -> what it computes with


@dataclass(frozen=True)
class Stop:
    """Where a rehearsal went wrong."""

    position: int  # operations that went well
    record: OpRecord  # what should have happened next
    error: str


class WrongSizeError(Exception):
    """A tensor of the cut network has another size than its labels foretell, or a factor follows a width."""


class ShapeChecker(OpObserver):
    """Watches a cut network operation by operation and stops it at the first tensor of a wrong size.

    Args:
        script: what happens in the whole network.
        size_of: how many channels are left of a dimension with these labels.
        factors: by line of code, those of the masked network; of a network that decides by values they tell what
            follows a width and what a value. None: those of the script.
        is_sketch: whether it is run without values.
    """

    def __init__(
        self,
        op_log: Sequence[OpRecord],
        size_of: Callable[[Tensor], int],
        *,
        factors: FactorsByLine | None = None,
        is_meta: bool,
    ) -> None:
        super().__init__(is_meta=is_meta)
        self._op_log, self._size_of, self._factors = op_log, size_of, factors
        self.position = 0  # operations that went well
        self.blamed: int | None = None  # where the network first did something else than in the walk
        self._is_in_step = True

    @property
    def expected(self) -> OpRecord:
        """What should happen next, or should have happened where it first went another way."""
        position = self.position if self.blamed is None else self.blamed
        return self._op_log[min(position, len(self._op_log) - 1)]

    def on_op(self, call: OpCall) -> None:
        """Compare one operation with what the walk saw in its place."""
        name, expected = call.name, self.expected
        if name in _STRIDES and expected.op != name:
            return
        while expected.op in _STRIDES and expected.op != name and self.position < len(self._op_log) - 1:
            self.position += 1
            expected = self.expected
        if self._is_in_step and not _is_same(expected.op, name):
            # A kernel may be chosen by size; from there on only what breaks by itself is seen.
            self._is_in_step, self.blamed = False, self.position
        if self._is_in_step:
            if self._factors is None and call.scalars != expected.scalars:
                raise WrongSizeError(f"a factor of {expected.scalars} that is now {call.scalars}")
            for result, (dense, labels) in zip(call.results, expected.results, strict=False):
                if not labels or result.ndim != len(dense):
                    continue
                wanted = [self._size_of(labels[d]) if d in labels else size for d, size in enumerate(dense)]
                if not self.is_meta:
                    # Who decides by values, as a detector does on how many boxes there are, may come to other sizes.
                    found = zip(wanted, dense, result.shape, strict=True)
                    wanted = [size if size != whole else own for size, whole, own in found]
                if list(result.shape) != wanted:
                    raise WrongSizeError(f"a tensor of shape {list(result.shape)} where {wanted} should be")
        if call.scalars and (self._factors is not None or not self._is_in_step):
            self._check_factors(call)
        self.position += 1

    def _check_factors(self, call: OpCall) -> None:
        """By line of code: out of step, or beside the masked network, that is what tells what should have happened."""
        line = call.name, source_line()
        alike = [number for number, one in enumerate(self._op_log) if (one.op, one.source) == line and line[1]]
        known = {self._op_log[number].scalars for number in alike}
        if alike and self._factors is not None:
            known = self._factors.get(line, known)
        if known and call.scalars not in known:
            self.blamed = alike[0]
            raise WrongSizeError(f"a factor of {min(known)} that is now {call.scalars}")


class FactorRecorder(OpObserver):
    """Notes which factors every line of code computes with."""

    def __init__(self) -> None:
        super().__init__(is_meta=False)
        self.found: FactorsByLine = {}

    def on_op(self, call: OpCall) -> None:
        """One operation."""
        if call.scalars:
            self.found.setdefault((call.name, source_line()), set()).add(call.scalars)


_STRIDES = "aten.clone", "aten.as_strided_"  # whether they are needed is a matter of strides, not of sizes
_VIEWS = ("aten.view", "aten._unsafe_view", "aten._reshape_alias")


def _is_same(op: str, other: str) -> bool:
    return op == other or (op in _VIEWS and other in _VIEWS)
