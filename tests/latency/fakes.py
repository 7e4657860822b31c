"""A backend with a law of its own: every layer takes what it says, so that tables and plans can be right or wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from passdeploy.channels.costs import Factor
from passdeploy.channels.groups import ChannelMap
from passdeploy.grouping.find import map_channels
from passdeploy.latency.hardware import MeasurementContext
from passdeploy.latency.network_timing import NetworkTiming
from passdeploy.latency.sampling import SamplingPlan, sample_latency
from passdeploy.latency.table import LatencyTable
from passdeploy.profiling.kernel_times import NodeTime
from tests.profiling.fakes import FakeClock, FakeRunner

WIDTHS = (64, 96, 48)
HERE = MeasurementContext("Imaginary CPU", "x86_64", "avx2", "fake", "1.0", 1, 1, (3, 8, 8))
QUICK = SamplingPlan(measurements=18, rounds=1, seconds=0.01)


def chain() -> ChannelMap:
    """Three convolutions and a classifier: groups '0', '2' and '4'."""
    layers: list[nn.Module] = []
    before = 3
    for width in WIDTHS:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
        before = width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))
    return map_channels(net.eval(), torch.zeros(1, 3, 8, 8))


def in_blocks(inputs: int, outputs: int) -> float:
    """Milliseconds of a convolution whose kernels take 8 channels together."""
    return 0.02 + 1e-4 * (-(-inputs // 8) * 8) * (-(-outputs // 8) * 8) + 2e-3 * outputs


class FakeProber:
    """A chain of convolutions; `surcharge` is what whole networks take beyond what their layers do, as a factor."""

    backend, block = "fake", 8

    def __init__(
        self,
        law: Callable[[int, int], float] = in_blocks,
        surcharge: Callable[[Mapping[str, int]], float] = lambda widths: 1.0,
    ) -> None:
        self.clock, self._law, self._surcharge = FakeClock(), law, surcharge
        self.built: list[Mapping[str, int]] = []

    def nodes(self, widths: Mapping[str, int]) -> tuple[NodeTime, ...]:
        first, second, third = (widths.get(name, full) for name, full in zip("024", WIDTHS, strict=True))
        ends = (3, first), (first, second), (second, third)
        return tuple(
            NodeTime(f"conv{n}", "Conv", ((1, a, 8, 8), (b, a, 3, 3), (1, b, 8, 8)), 2, self._law(a, b))
            for n, (a, b) in enumerate(ends)
        )

    def total(self, widths: Mapping[str, int]) -> float:
        return sum(node.ms for node in self.nodes(widths)) * self._surcharge(widths)

    def runner(self, widths: Mapping[str, int], name: str) -> FakeRunner:
        self.built.append(widths)
        return FakeRunner(name, self.clock, self.total(widths))

    def measure(self, widths: Mapping[str, int], *, seconds: float) -> NetworkTiming:
        return NetworkTiming(dict(widths), self.total(widths), self.nodes(widths))


class SteadyProber:
    """Any network, as if a channel of any group took as long as any other; on a clock that is moved by hand."""

    backend, block = "torch", 16

    def __init__(self, channels: ChannelMap) -> None:
        self.clock, self._full = FakeClock(), {group.name: group.width for group in channels.prunable}

    def nodes(self, widths: Mapping[str, int]) -> tuple[NodeTime, ...]:
        return tuple(
            NodeTime(name, "Conv", ((1, full),), 1, 0.02 + 0.01 * widths.get(name, full), (Factor(0, ((name, 1),)),))
            for name, full in self._full.items()
        )

    def total(self, widths: Mapping[str, int]) -> float:
        return sum(node.ms for node in self.nodes(widths))

    def runner(self, widths: Mapping[str, int], name: str) -> FakeRunner:
        return FakeRunner(name, self.clock, self.total(widths))

    def measure(self, widths: Mapping[str, int], *, seconds: float) -> NetworkTiming:
        return NetworkTiming(dict(widths), self.total(widths), self.nodes(widths))


def table_of(sampler: FakeProber, channels: ChannelMap, plan: SamplingPlan = QUICK) -> LatencyTable:
    return sample_latency(sampler, channels, HERE, plan)
