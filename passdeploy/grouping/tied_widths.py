"""Find pairs of widths that the model's code assumes to be equal.

`q.view(b, n, self.heads, c // self.heads)` takes `c` from the block's input, so the queries must stay as wide as that
input, however both are cut. If a trial stops at such a line, its channels are joined one to one with as many channels
that the module met before: the same ones are then removed from both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from passdeploy.tracing.trace import OpRecord

MAX_DEPTH = 3  # number of modules around the line of code to look in, the innermost first
MAX_PARTNERS = 4  # vectors of labels to try; the earliest come first, since they are the module's inputs


@dataclass(frozen=True)
class WidthEquality:
    """Pairs of label vectors to be joined, one pair for each call of the modules of a class."""

    key: tuple[str, ...]  # the line of code, and where in the module the pair was found
    pairs: tuple[tuple[Tensor, Tensor], ...]  # the second vector is repeated to the length of the first


LabelsPosition = tuple[int, int, int, int]  # index in the op log, 0 for inputs and 1 for results, which one, dimension


def width_equalities(
    op_log: Sequence[OpRecord], position: int, class_of: Callable[[str], type], roots_of: Callable[[Tensor], Tensor]
) -> Iterator[WidthEquality]:
    """Yield equalities that may get a cut network past the operation where it stopped, the likeliest first.

    Args:
        op_log: the operations of the whole network.
        position: index of the operation at which the cut network stopped.
        class_of: name of a module -> its class.
        roots_of: labels -> their roots.
    """
    modules = op_log[position].modules
    for depth in range(1, min(len(modules), MAX_DEPTH) + 1):
        calls = _calls(op_log, position, depth, class_of)
        start = next(start for start, end in calls if start <= position < end)
        partners = _vectors(op_log, range(start, position + 1), roots_of)
        for own, vector in _vectors(op_log, range(position, min(position + 2, len(op_log))), roots_of):
            fitting = [partner for partner, other in partners if _fits(vector, other, roots_of)]
            for partner in fitting[:MAX_PARTNERS]:
                pairs = [_pair(op_log, begin - start, own, partner) for begin, _ in calls]
                whole = [pair for pair in pairs if pair is not None and len(pair[0]) % len(pair[1]) == 0]
                where = own[0] - position, *own[1:], position - partner[0], *partner[1:]
                yield WidthEquality((op_log[position].source, *map(str, where)), tuple(whole))


def _calls(
    op_log: Sequence[OpRecord], position: int, depth: int, class_of: Callable[[str], type]
) -> list[tuple[int, int]]:
    """Return the ranges (start, end) of the op log in which a module of one class ran and did the same as here.

    The class is that of the module `depth` levels around the operation at `position`.
    """
    stopped = op_log[position]
    level, kind = len(stopped.modules) - depth, class_of(stopped.modules[-depth])
    spans: list[tuple[int, int, str]] = []
    for index, record in enumerate(op_log):
        if len(record.modules) <= level:
            continue
        name = record.modules[level]
        if spans and spans[-1][1:] == (index, name):
            spans[-1] = spans[-1][0], index + 1, name
        elif class_of(name) is kind:
            spans.append((index, index + 1, name))
    start = next(start for start, end, _ in spans if start <= position < end)
    return [
        (begin, end)
        for begin, end, _ in spans
        if (same := begin + position - start) < end
        and op_log[same].source == stopped.source
        and op_log[same].op == stopped.op
    ]


def _vectors(
    op_log: Sequence[OpRecord], indices: Sequence[int], roots_of: Callable[[Tensor], Tensor]
) -> list[tuple[LabelsPosition, Tensor]]:
    """Return the label vectors of some operations, one of those with equal roots."""
    seen: set[bytes] = set()
    vectors = []
    for index in indices:
        for side, tensors in enumerate((op_log[index].inputs, op_log[index].results)):
            for number, (_, labels) in enumerate(tensors):
                for dim, vector in labels.items():
                    if (key := roots_of(vector).numpy().tobytes()) not in seen:
                        seen.add(key)
                        vectors.append(((index, side, number, dim), vector))
    return vectors


def _fits(vector: Tensor, other: Tensor, roots_of: Callable[[Tensor], Tensor]) -> bool:
    """True if a vector is as long as `other`, or a multiple of it (queries, keys and values), and is not joined yet."""
    times, rest = divmod(len(vector), len(other))
    return not rest and not roots_of(vector).equal(roots_of(other).repeat(times))


def _pair(
    op_log: Sequence[OpRecord], shift: int, own: LabelsPosition, partner: LabelsPosition
) -> tuple[Tensor, Tensor] | None:
    """Return the same two vectors in another call, `shift` operations away, or None if they are not there."""
    pair = []
    for index, side, number, dim in (own, partner):
        if not 0 <= index + shift < len(op_log):
            return None
        tensors = (op_log[index + shift].inputs, op_log[index + shift].results)[side]
        labels = tensors[number][1] if number < len(tensors) else {}
        if dim not in labels:
            return None
        pair.append(labels[dim])
    return pair[0], pair[1]
