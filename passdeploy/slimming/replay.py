"""Record the decisions of one network (ranking, thresholds, NMS) and replay them in another that it is compared with.

Rounding breaks a tie differently in two networks that are equal but for rounding, and from there on they compute with
different boxes. With the decisions of the first, only what is computed from them is compared. A decision that differs
for another reason than rounding is found out by what it was made from: `DecisionLog.error`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RANKING = ("aten.topk", "aten.sort")  # return values and their indices: the values follow from the indices
FINDING = ("torchvision.nms", "aten.nonzero")  # how much they find depends on the values
CHOOSING = (*FINDING, "aten.argsort", "aten.argmax")
COMPARING = ("aten.gt", "aten.ge", "aten.lt", "aten.le", "aten.eq", "aten.ne")


@dataclass(frozen=True)
class _Decision:
    """A decision, and copies of what it was made from, since later operations may overwrite that."""

    op: str
    made: Tensor
    sources: Sequence[Tensor]


class DecisionLog:
    """Results of ranking, choosing and comparing operations, in the order of the forward pass.

    `error` is the largest relative difference between what the recorded and the repeated network decided by, over the
    decisions that differ: as small as rounding if all of them were ties.
    """

    def __init__(self) -> None:
        self._made: list[_Decision] = []
        self.error = 0.0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record decisions in this context."""
        self._made.clear()
        with _Watched(self._remember):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Return the recorded decisions in this context, as long as the same operations ask for them.

        A decision over another number of channels is made anew.
        """
        self._left, self.error = iter(self._made), 0.0
        with _Watched(self._repeat):
            yield

    def _remember(self, op: str, given: Mapping[str, Any], result: Any) -> Any:
        sources = [source.clone() for source in _sources_of(given)]
        self._made.append(_Decision(op, result[1] if op in RANKING else result, sources))
        return result

    def _repeat(self, op: str, given: Mapping[str, Any], result: Any) -> Any:
        known = next(self._left, None)
        if known is None or known.op != op:
            self._left = iter(())  # another sequence of operations: from here on its own results count
            return result
        own, sources = result[1] if op in RANKING else result, _sources_of(given)
        if torch.equal(known.made, own) or not _is_repeatable(known, own, sources):
            return result
        self.error = max(self.error, *map(_difference, known.sources, sources))
        if op not in RANKING:
            return known.made
        source = given["self"]
        return (source.gather(given.get("dim", -1), known.made), known.made) if source.ndim else result


def _is_repeatable(known: _Decision, own: Tensor, sources: Sequence[Tensor]) -> bool:
    """True if a decision was made from tensors of these shapes, and has a shape that this one might have, too."""
    if [one.shape for one in sources] != [one.shape for one in known.sources]:
        return False
    return known.op in FINDING or known.made.shape == own.shape


def _sources_of(given: Mapping[str, Any]) -> list[Tensor]:
    """List the tensors that an operation decides by."""
    return [value for value in given.values() if isinstance(value, Tensor)]


def _difference(recorded: Tensor, repeated: Tensor) -> float:
    """Divide the largest difference by the largest finite magnitude; infinities are equal to themselves."""
    before, after = (torch.view_as_real(one) if one.is_complex() else one for one in (recorded, repeated))
    before, after = before.double(), after.double()
    differs = before != after
    if not differs.any():
        return 0.0
    largest = before[before.isfinite()].abs().max() if before.isfinite().any() else before.new_ones(())
    error = float(((before - after)[differs].abs() / largest.clamp_min(1e-30)).max())
    return error if error == error else float("inf")


class _Watched(TorchDispatchMode):
    def __init__(self, decide: Callable[[str, Mapping[str, Any], Any], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._decide = decide

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run any operation; record or replace its result if it is a decision."""
        result = func(*args, **(kwargs or {}))
        op = str(func.overloadpacket)
        if op in _DECISIVE and all(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            names = (slot.name for slot in func._schema.arguments)
            return self._decide(op, {**dict(zip(names, args, strict=False)), **(kwargs or {})}, result)
        return result


_DECISIVE = {*RANKING, *CHOOSING, *COMPARING}


def decides(ops: Sequence[str]) -> bool:
    """Return True if one of these operations ranks or chooses."""
    return any(op in RANKING or op in CHOOSING for op in ops)
