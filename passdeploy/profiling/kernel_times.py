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
    """One kernel call."""

    name: str  # the same in networks that differ in their widths only
    kind: str  # the operator
    shapes: tuple[Shape, ...]  # of what it reads (weights too), then of what it writes
    inputs: int  # how many of `shapes` are read
    ms: float  # of a typical traced call
    sizes: tuple[Factor, ...] | None = None  # what it follows, where the backend knows; else it is told from the shapes


def typical(times: list[float]) -> float:
    """The mean of the faster middle, from the first to the fifth decile.

    What disturbs a call only ever adds to it; and where a clock counts whole microseconds, a mean does not show it.
    """
    ordered = np.sort(np.asarray(times, float))
    low, high = len(ordered) // 10, max(len(ordered) // 2, len(ordered) // 10 + 1)
    return float(ordered[low:high].mean())
