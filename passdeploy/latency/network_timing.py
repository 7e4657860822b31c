"""What one look at a network of certain widths saw: how long the whole took, and how long each of its nodes.

A node is one call of a kernel, as the backend runs it after its own fusions. Layers are timed inside the whole
network: timed alone, each would pay for a call of its own and find its input in another cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Protocol

from passdeploy.profiling.clock import Clock
from passdeploy.profiling.kernel_times import FEWEST_CALLS, NodeTime
from passdeploy.profiling.runners import Runner


@dataclass(frozen=True)
class NetworkTiming:
    """One network at one choice of widths."""

    widths: Mapping[str, int]  # group name -> channels kept; groups not named are whole
    total_ms: float  # median of untraced calls
    nodes: tuple[NodeTime, ...]  # in the order of a call

    def times(self, factor: float) -> NetworkTiming:
        """The same on a machine that takes `factor` times as long."""
        nodes = tuple(replace(node, ms=factor * node.ms) for node in self.nodes)
        return replace(self, total_ms=factor * self.total_ms, nodes=nodes)


class LatencySampler(Protocol):
    """A backend that can run, and look into, a network at any widths."""

    backend: str
    block: int  # kernels compute channels in blocks of this many

    @property
    def clock(self) -> Clock:
        """What times them."""
        ...

    def runner(self, widths: Mapping[str, int], name: str) -> Runner:
        """The network at `widths`, ready to be timed."""
        ...

    def measure(self, widths: Mapping[str, int], *, seconds: float) -> NetworkTiming:
        """Build the network at `widths` and look at it for about `seconds`."""
        ...


def undisturbed(first: NetworkTiming, second: NetworkTiming) -> NetworkTiming:
    """Two observations of one network as one: of everything the shorter time, since disturbances only add."""
    again = {node.name: node.ms for node in second.nodes}
    nodes = tuple(replace(node, ms=min(node.ms, again.get(node.name, node.ms))) for node in first.nodes)
    return replace(first, total_ms=min(first.total_ms, second.total_ms), nodes=nodes)


def median_ms(work: Callable[[], object], clock: Clock, *, seconds: float, fewest: int = FEWEST_CALLS) -> float:
    """The median time of one call, of `fewest` or more, after calls that are not timed."""
    began, found = clock.now(), list[float]()
    while clock.now() - began < 0.25 * seconds or not found:
        found.append(clock.time_ms(work))
    began, found = clock.now(), []
    while len(found) < fewest or clock.now() - began < 0.75 * seconds:
        found.append(clock.time_ms(work))
    return median(found)
