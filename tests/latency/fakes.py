"""Fake latency samplers: layer times come from a formula, so that tables and plans can be checked against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn

from passdeploy.channels.costs import Factor
from passdeploy.channels.groups import ChannelMap
from passdeploy.grouping.find import map_channels
from passdeploy.latency.measurement_context import MeasurementContext
from passdeploy.latency.network_timing import NetworkTiming
from passdeploy.latency.sampling import SamplingPlan, sample_latency
from passdeploy.latency.table import LatencyTable
from passdeploy.profiling.kernel_times import NodeTime
from tests.profiling.fakes import FakeClock, FakeRunner

WIDTHS = (64, 96, 48)
HERE = MeasurementContext("Imaginary CPU", "x86_64", "avx2", "fake", "1.0", 1, 1, (3, 8, 8))
QUICK = SamplingPlan(networks=18, repeats=1, seconds=0.01)


def chain(widths: Sequence[int] = WIDTHS) -> ChannelMap:
    """Map a network of convolutions and a classifier: groups '0', '2', '4', ..."""
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
        before = width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))
    return map_channels(net.eval(), torch.zeros(1, 3, 8, 8))


def blocked_ms(inputs: int, outputs: int) -> float:
    """Compute the milliseconds of a convolution whose kernels take 8 channels together."""
    return 0.02 + 1e-4 * (-(-inputs // 8) * 8) * (-(-outputs // 8) * 8) + 2e-3 * outputs


class FormulaSampler:
    """Sampler whose nodes come from a formula, and whose networks take as long as their nodes."""

    clock: FakeClock

    def nodes(self, widths: Mapping[str, int]) -> tuple[NodeTime, ...]:
        raise AssertionError("a subclass implements nodes")

    def total(self, widths: Mapping[str, int]) -> float:
        return sum(node.ms for node in self.nodes(widths))

    def runner(self, widths: Mapping[str, int], name: str) -> FakeRunner:
        return FakeRunner(name, self.clock, self.total(widths))

    def measure(self, widths: Mapping[str, int], *, seconds: float) -> NetworkTiming:
        return NetworkTiming(dict(widths), self.total(widths), self.nodes(widths))


class FakeSampler(FormulaSampler):
    """Sampler of the chain of convolutions; `network_factor` multiplies the sum of a network's layers."""

    backend, block = "fake", 8

    def __init__(
        self,
        layer_ms: Callable[[int, int], float] = blocked_ms,
        network_factor: Callable[[Mapping[str, int]], float] = lambda widths: 1.0,
        widths: Sequence[int] = WIDTHS,
    ) -> None:
        self.clock, self._layer_ms, self._network_factor = FakeClock(), layer_ms, network_factor
        self.full = {f"{2 * number}": width for number, width in enumerate(widths)}
        self.built: list[Mapping[str, int]] = []

    def nodes(self, widths: Mapping[str, int]) -> tuple[NodeTime, ...]:
        ends = pairwise([3, *(widths.get(name, full) for name, full in self.full.items())])
        return tuple(
            NodeTime(f"conv{n}", "Conv", ((1, a, 8, 8), (b, a, 3, 3), (1, b, 8, 8)), 2, self._layer_ms(a, b))
            for n, (a, b) in enumerate(ends)
        )

    def total(self, widths: Mapping[str, int]) -> float:
        return sum(node.ms for node in self.nodes(widths)) * self._network_factor(widths)

    def runner(self, widths: Mapping[str, int], name: str) -> FakeRunner:
        self.built.append(widths)
        return FakeRunner(name, self.clock, self.total(widths))


class SteadySampler(FormulaSampler):
    """Sampler of any network, in which all channels take equally long; its clock is moved by hand."""

    backend, block = "torch", 16

    def __init__(self, channels: ChannelMap) -> None:
        self.clock, self._full = FakeClock(), {group.name: group.width for group in channels.prunable}

    def nodes(self, widths: Mapping[str, int]) -> tuple[NodeTime, ...]:
        return tuple(
            NodeTime(name, "Conv", ((1, full),), 1, 0.02 + 0.01 * widths.get(name, full), (Factor(0, ((name, 1),)),))
            for name, full in self._full.items()
        )


def table_of(sampler: FakeSampler, channels: ChannelMap, plan: SamplingPlan = QUICK) -> LatencyTable:
    return sample_latency(sampler, channels, HERE, plan)
