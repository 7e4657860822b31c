"""Kernel times: what one call of a kernel took and which tensor shapes it read and wrote, in any backend."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from itertools import count

import numpy as np

from passdeploy.channels.costs import Factor

Shape = tuple[int, ...]
SKIPPED_CALLS = 1  # at the start of a trace: the first call allocates
FEWEST_CALLS = 8  # that a median or a typical time is taken from


@dataclass(frozen=True)
class NodeTime:
    """One kernel of a network, with the time of a typical call."""

    name: str  # the same in networks that differ in their widths and blocks; "module/..." where that is known
    kind: str  # the operator
    shapes: tuple[Shape, ...]  # of what it reads (weights too), then of what it writes
    inputs: int  # how many of `shapes` are read
    ms: float  # of a typical traced call
    sizes: tuple[Factor, ...] | None = None  # channel widths it depends on; None: infer them from shapes


def name_in_module(module: str, kind: str, known: Container[str]) -> str:
    """Name a node after its module and operator, with the first number that gives a name that is not known yet.

    >>> name_in_module("layer1.0", "Relu", {"layer1.0/Relu.0"})
    'layer1.0/Relu.1'
    """
    return next(name for number in count() if (name := f"{module}/{kind}.{number}") not in known)


def module_of(name: str) -> str:
    """Return the module that a node is named after; empty if there is none.

    >>> module_of("layer1.0/Relu.1"), module_of("reorder_token_7")
    ('layer1.0', '')
    """
    module, slash, _ = name.partition("/")
    return module if slash else ""


def typical_time(times: list[float]) -> float:
    """Average the times between the first and the fifth decile.

    Disturbances only ever lengthen a call, so the slower half is left out. A mean is finer than a median where the
    clock counts whole microseconds.
    """
    ordered = np.sort(np.asarray(times, float))
    low, high = len(ordered) // 10, max(len(ordered) // 2, len(ordered) // 10 + 1)
    return float(ordered[low:high].mean())
