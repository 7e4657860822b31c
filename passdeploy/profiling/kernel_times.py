"""Kernel times: what one call of a kernel took and which tensor shapes it read and wrote, in any backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from passdeploy.channels.costs import Factor

Shape = tuple[int, ...]
SKIPPED_CALLS = 1  # at the start of a trace: the first call allocates
FEWEST_CALLS = 8  # that a median or a typical time is taken from


@dataclass(frozen=True)
class NodeTime:
    """One kernel of a network, with the time of a typical call."""

    name: str  # the same in networks that differ only in their widths
    kind: str  # the operator
    shapes: tuple[Shape, ...]  # of what it reads (weights too), then of what it writes
    inputs: int  # how many of `shapes` are read
    ms: float  # of a typical traced call
    sizes: tuple[Factor, ...] | None = None  # channel widths it depends on; None: infer them from shapes


def typical_time(times: list[float]) -> float:
    """Average the times between the first and the fifth decile.

    Disturbances only ever lengthen a call, so the slower half is left out. A mean is finer than a median where the
    clock counts whole microseconds.
    """
    ordered = np.sort(np.asarray(times, float))
    low, high = len(ordered) // 10, max(len(ordered) // 2, len(ordered) // 10 + 1)
    return float(ordered[low:high].mean())
