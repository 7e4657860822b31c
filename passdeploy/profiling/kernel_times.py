"""Times of single kernels, from traces of ONNX Runtime's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from passdeploy.channels.costs import Factor

Shape = tuple[int, ...]


FEWEST_CALLS = 8


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


_KERNEL = "_kernel_time"


SKIPPED_CALLS = 1  # the first one allocates


def read_trace(events: list[dict[str, Any]]) -> tuple[NodeTime, ...]:
    """The nodes of ONNX Runtime's profile, in the order of a call, each with its typical time."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            found[event["name"].removesuffix(_KERNEL)].append(event)
    nodes = []
    for name, calls in found.items():
        read, written = (tuple(_shapes(calls[-1]["args"][f"{end}_type_shape"])) for end in ("input", "output"))
        took = [float(call["dur"]) for call in calls[SKIPPED_CALLS:]] or [float(call["dur"]) for call in calls]
        nodes.append(NodeTime(name, calls[-1]["args"]["op_name"], (*read, *written), len(read), typical(took) / 1e3))
    return tuple(nodes)


def _shapes(entries: list[dict[str, list[int]]]) -> Iterator[Shape]:
    for entry in entries:
        yield tuple(next(iter(entry.values()), ()))
