"""Timing of one network: milliseconds of a whole call and of each node, and the interface of samplers.

A node is one call of a kernel, as the backend runs it after its own fusions. Layers are timed inside the whole network:
timed alone, each would include the overhead of a call, and its input would be in another cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Protocol, runtime_checkable

from passdeploy.profiling.clock import Clock
from passdeploy.profiling.kernel_times import FEWEST_CALLS, NodeTime
from passdeploy.profiling.runners import Runner

SLOW_TO_BUILD = ("compile", "ort-cuda", "tensorrt")  # backends where building takes longer than measuring
_FEWEST_WINDOWS, _MOST_WINDOWS = 2, 6
_AGREEMENT = 0.02  # share by which the two fastest windows may differ


@dataclass(frozen=True)
class NetworkTiming:
    """Measured times of a network at certain widths."""

    widths: Mapping[str, int]  # group name -> channels kept; groups not named are whole
    total_ms: float  # median of untraced calls; nan: not timed
    nodes: tuple[NodeTime, ...]  # in the order of a call


class LatencySampler(Protocol):
    """Backend that builds a network at any widths and times it and its nodes."""

    backend: str
    block: int  # kernels compute channels in blocks of this many

    @property
    def clock(self) -> Clock:
        """Clock that times the networks."""
        ...

    def runner(self, widths: Mapping[str, int], name: str) -> Runner:
        """Load the network at `widths`, ready to be timed."""
        ...

    def measure(self, widths: Mapping[str, int], *, seconds: float) -> NetworkTiming:
        """Build the network at `widths` and measure it for about `seconds`."""
        ...


@runtime_checkable
class TracingSampler(LatencySampler, Protocol):
    """Sampler that times the nodes of a network in another backend, where it is built at once."""

    traces_elsewhere: bool  # False: its nodes are its own, and a network is built quickly anyway

    def trace(self, widths: Mapping[str, int], *, seconds: float) -> tuple[NodeTime, ...]:
        """Time the nodes of the network at `widths` alone."""
        ...


def merge_timings(first: NetworkTiming, second: NetworkTiming) -> NetworkTiming:
    """Merge two timings of one network: keep the shorter of any two times, since disturbances only add time."""
    second_ms = {node.name: node.ms for node in second.nodes}
    nodes = tuple(replace(node, ms=min(node.ms, second_ms.get(node.name, node.ms))) for node in first.nodes)
    return replace(first, total_ms=min(first.total_ms, second.total_ms), nodes=nodes)


def steady_ms(work: Callable[[], object], clock: Clock, *, seconds: float) -> float:
    """Measure the median time of a call in windows, until the two fastest agree; returns that of the fastest.

    Other programs only lengthen calls. On a GPU that is shared they do so for whole windows, which no median of the
    calls of one window shows.

    Args:
        work: the call.
        clock: that times it.
        seconds: of the first two windows together, warm-up included.
    """
    windows: list[float] = []
    while len(windows) < _FEWEST_WINDOWS or (len(windows) < _MOST_WINDOWS and not _two_agree(windows)):
        windows.append(median_ms(work, clock, seconds=seconds / _FEWEST_WINDOWS))
    return min(windows)


def _two_agree(windows: list[float]) -> bool:
    """Test whether the two fastest windows differ by little."""
    fastest, second = sorted(windows)[:2]
    return second <= (1 + _AGREEMENT) * fastest


def median_ms(work: Callable[[], object], clock: Clock, *, seconds: float, fewest: int = FEWEST_CALLS) -> float:
    """Measure the median time of at least `fewest` calls, after a warm-up of a quarter of `seconds`."""
    began, times = clock.now(), list[float]()
    while clock.now() - began < 0.25 * seconds or not times:
        times.append(clock.time_ms(work))
    began, times = clock.now(), []
    while len(times) < fewest or clock.now() - began < 0.75 * seconds:
        times.append(clock.time_ms(work))
    return median(times)
