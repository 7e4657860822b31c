"""Widths that the model's code takes for one and the same.

`q.view(b, n, self.heads, c // self.heads)` takes `c` from the stream that the block reads, so the queries must stay as
wide as the stream, however both are cut. Where a rehearsed cut stops in such a line, channels that meet there are
joined, place by place, with channels of the same number that the module saw before: what goes, goes from both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from passdeploy.tracing.trace import OpRecord

MOST_DEPTH = 3  # of modules around the line of code, the innermost first
MOST_PARTNERS = 4  # that the module saw, the earliest first: what it was called with


@dataclass(frozen=True)
class WidthEquality:
    """Vectors of labels to be joined in pairs, in every module of a class."""

    key: tuple[str, ...]  # the line of code, and where in the module the pair was found
    pairs: tuple[tuple[Tensor, Tensor], ...]


def width_equalities(
    op_log: Sequence[OpRecord], position: int, class_of: Callable[[str], type], root_of: Callable[[Tensor], Tensor]
) -> Iterator[WidthEquality]:
    """Joins that may help where a cut network stopped, the likeliest first.

    Args:
        script: what happened in the dense network.
        position: where in it the cut one stopped.
        class_of: of a module, by name.
        root_of: labels -> their representatives.
    """
    modules = op_log[position].modules
    for depth in range(1, min(len(modules), MOST_DEPTH) + 1):
        calls = _calls(op_log, position, depth, class_of)
        start = next(start for start, end in calls if start <= position < end)
        partners = _vectors(op_log, range(start, position + 1), root_of)
        for ours, vector in _vectors(op_log, range(position, min(position + 2, len(op_log))), root_of):
            fitting = [place for place, other in partners if _fits(vector, other, root_of)]
            for partner in fitting[:MOST_PARTNERS]:
                pairs = [_pair(op_log, begin - start, ours, partner) for begin, _ in calls]
                whole = [pair for pair in pairs if pair is not None and len(pair[0]) % len(pair[1]) == 0]
                key = (
                    op_log[position].source,
                    *map(str, (ours[0] - position, *ours[1:], position - partner[0], *partner[1:])),
                )
                yield WidthEquality(key, tuple(whole))


_Where = tuple[int, int, int, int]  # position in the script, results or inputs, which of them, dimension


def _calls(
    op_log: Sequence[OpRecord], position: int, depth: int, class_of: Callable[[str], type]
) -> list[tuple[int, int]]:
    """When modules of the class of the one at that depth ran, and did there what this one did: start and end."""
    stopped = op_log[position]
    level, kind = len(stopped.modules) - depth, class_of(stopped.modules[-depth])
    spans: list[tuple[int, int, str]] = []
    for number, record in enumerate(op_log):
        if len(record.modules) <= level:
            continue
        name = record.modules[level]
        if spans and spans[-1][1:] == (number, name):
            spans[-1] = spans[-1][0], number + 1, name
        elif class_of(name) is kind:
            spans.append((number, number + 1, name))
    start = next(start for start, end, _ in spans if start <= position < end)
    return [
        (begin, end)
        for begin, end, _ in spans
        if (at := begin + position - start) < end
        and op_log[at].source == stopped.source
        and op_log[at].op == stopped.op
    ]


def _vectors(
    op_log: Sequence[OpRecord], positions: Sequence[int], root_of: Callable[[Tensor], Tensor]
) -> list[tuple[_Where, Tensor]]:
    """The labels along dimensions in a part of the script, each once."""
    seen: set[bytes] = set()
    found = []
    for position in positions:
        for side, tensors in enumerate((op_log[position].inputs, op_log[position].results)):
            for number, (_, labels) in enumerate(tensors):
                for dim, vector in labels.items():
                    if (key := root_of(vector).numpy().tobytes()) not in seen:
                        seen.add(key)
                        found.append(((position, side, number, dim), vector))
    return found


def _fits(vector: Tensor, other: Tensor, root_of: Callable[[Tensor], Tensor]) -> bool:
    """Whether one may be tied to the other: as long, or several times as long, as queries, keys and values are."""
    times, rest = divmod(len(vector), len(other))
    return not rest and not root_of(vector).equal(root_of(other).repeat(times))


def _pair(op_log: Sequence[OpRecord], shift: int, ours: _Where, partner: _Where) -> tuple[Tensor, Tensor] | None:
    """The same two vectors in another call of the module, if they are there."""
    pair = []
    for position, side, number, dim in (ours, partner):
        if not 0 <= position + shift < len(op_log):
            return None
        tensors = (op_log[position + shift].inputs, op_log[position + shift].results)[side]
        labels = tensors[number][1] if number < len(tensors) else {}
        if dim not in labels:
            return None
        pair.append(labels[dim])
    return pair[0], pair[1]
