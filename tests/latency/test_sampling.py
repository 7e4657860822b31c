"""Sampling on a machine of varying speed, and at the networks that planners choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain as chain_of
from itertools import count, repeat

import pytest
import torch
from torch import nn

from passdeploy.channels.groups import ChannelMap
from passdeploy.grouping.find import map_channels
from passdeploy.latency.network_timing import NetworkTiming, steady_ms
from passdeploy.latency.sampling import SamplingPlan, alike_groups, draw_widths
from passdeploy.latency.table import LatencyTable
from passdeploy.profiling.kernel_times import NodeTime
from tests.profiling.fakes import FakeClock, FakeRunner

from .fakes import QUICK, FakeSampler, blocked_ms, chain, table_of


class SometimesSlowSampler(FakeSampler):
    """Sampler on a machine that is 1.5 times as slow from the fourth measurement to the seventh."""

    def __init__(self) -> None:
        super().__init__()
        self.measurements: list[dict[str, int]] = []

    def total(self, widths: Mapping[str, int]) -> float:
        return super().total(widths) * (1.5 if 4 <= len(self.measurements) <= 7 else 1.0)

    def runner(self, widths: Mapping[str, int], name: str) -> FakeRunner:
        return FakeRunner(name, self.clock, (self.total(widths) for _ in count()))

    def measure(self, widths: Mapping[str, int], *, seconds: float) -> NetworkTiming:
        self.measurements.append(dict(widths))
        return super().measure(widths, seconds=seconds)


@pytest.fixture(scope="module")
def channels() -> ChannelMap:
    return chain()


def test_what_was_measured_while_the_machine_was_slow_is_measured_again(channels: ChannelMap):
    sampler = SometimesSlowSampler()
    table = table_of(sampler, channels, replace(QUICK, target_shares=()))
    slow = sampler.measurements[3:7]
    assert all(sampler.measurements.count(widths) == 2 for widths in slow)
    assert sampler.measurements.count(sampler.measurements[12]) == 1
    undisturbed = FakeSampler()
    for widths in slow:
        assert table.predict_ms(widths) == pytest.approx(undisturbed.total(widths), rel=0.05)


def test_a_network_that_was_measured_again_anyway_when_the_machine_had_recovered_is_not_measured_once_more(
    channels: ChannelMap,
):
    sampler = SometimesSlowSampler()
    table_of(sampler, channels, replace(QUICK, repeats=2, target_shares=()))
    assert all(sampler.measurements.count(widths) == 2 for widths in sampler.measurements[3:7])


def test_the_last_measurements_are_of_plans(channels: ChannelMap):
    table = table_of(FakeSampler(), channels, replace(QUICK, target_shares=(0.7, 0.4)))
    assert len(table.measurements) == QUICK.fewest_networks + 2
    for (_, ms), share in zip(table.measurements[-2:], (0.7, 0.4), strict=True):
        assert 0.85 * share <= ms / table.dense_ms <= 1.05 * share


def test_a_share_that_cannot_be_reached_is_left_out(channels: ChannelMap):
    table = table_of(FakeSampler(), channels, replace(QUICK, target_shares=(0.01,)))
    assert len(table.measurements) == QUICK.fewest_networks


def erratic_ms(inputs: int, outputs: int) -> float:
    """Compute the milliseconds of a convolution that takes up to twice as long, by no rule."""
    return blocked_ms(inputs, outputs) * (1 + (inputs * 37 + outputs * 101) % 89 / 89)


def test_how_many_networks_are_measured_depends_on_the_error_that_is_seen(channels: ChannelMap):
    few, many = (table_of(FakeSampler(layer_ms), channels) for layer_ms in (blocked_ms, erratic_ms))
    assert len(few.measurements) == QUICK.fewest_networks + 3  # and three plans
    assert few.error[0] <= QUICK.small_error
    assert len(many.measurements) >= QUICK.networks
    none_too_few = table_of(FakeSampler(erratic_ms), channels, replace(QUICK, small_error=1.0, small_largest=10.0))
    assert len(none_too_few.measurements) < len(many.measurements)


def test_where_building_takes_the_time_networks_are_few_and_repeated_blocks_equally_wide():
    blocks = [nn.Conv2d(3, 64, 3, padding=1), *(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)), nn.Conv2d(64, 5, 1)]
    repeated = map_channels(nn.Sequential(*blocks).eval(), torch.zeros(1, 3, 8, 8))
    alike = alike_groups(repeated)
    assert alike == {"0": "0", "1": "1", "2": "1", "3": "3"}  # the first reads images, the last is read by the end
    for widths in draw_widths(repeated, 8, 8, seed=0, alike=alike):
        assert widths["1"] == widths["2"]
    assert len({widths["0"] == widths["1"] for widths in draw_widths(repeated, 8, 8, seed=0, alike=alike)}) == 2
    plans = SamplingPlan.of("compile"), SamplingPlan.of("ort")
    assert (plans[0].repeats, plans[1].repeats) == (1, 2)
    assert plans[0].networks < plans[1].networks


def test_a_window_that_was_disturbed_is_measured_again():
    clock = FakeClock()
    times = chain_of([1.5] * 110, repeat(1.0))  # another program takes a third of the device for a while
    runner = FakeRunner("network", clock, times)
    assert steady_ms(runner.run, clock, seconds=0.3) == pytest.approx(1.0)
    calm = FakeRunner("network", clock, 1.0)
    began = clock.now()
    steady_ms(calm.run, clock, seconds=0.3)
    assert clock.now() - began < 0.32  # and no longer than asked where nothing disturbs


class CompiledSampler(FakeSampler):
    """Sampler of a compiler: operators are timed without it, where those without a weight take four times as long."""

    backend, traces_elsewhere = "compile", True

    def __init__(self) -> None:
        super().__init__()
        self.measured, self.traced = list[Mapping[str, int]](), list[Mapping[str, int]]()

    def total(self, widths: Mapping[str, int]) -> float:
        return 0.05 + sum(node.ms if node.kind == "conv" else node.ms / 4 for node in self.nodes(widths))

    def nodes(self, widths: Mapping[str, int]) -> tuple[NodeTime, ...]:
        nodes = list[NodeTime]()
        for node in super().nodes(widths):
            written = node.shapes[2]
            relu = NodeTime(f"{node.name} relu", "relu", (written, written), 1, 4e-3 * written[1])
            nodes += [replace(node, kind="conv"), relu]
        return tuple(nodes)

    def trace(self, widths: Mapping[str, int], *, seconds: float) -> tuple[NodeTime, ...]:
        self.traced.append(widths)
        return self.nodes(widths)

    def measure(self, widths: Mapping[str, int], *, seconds: float) -> NetworkTiming:
        self.measured.append(widths)
        return super().measure(widths, seconds=seconds)


def test_where_a_compiler_takes_the_time_most_networks_are_timed_without_it(channels: ChannelMap):
    sampler, plan = CompiledSampler(), replace(SamplingPlan.of("compile"), seconds=0.01)
    table = table_of(sampler, channels, plan)
    assert len(sampler.traced) == plan.traced_networks
    assert len(sampler.measured) < 1 + plan.networks
    assert len(table.measurements) - len(table.estimated) == len({tuple(w.items()) for w in sampler.measured})
    for number in table.estimated:
        widths, ms = table.measurements[number]
        assert ms == pytest.approx(sampler.total(widths), rel=0.03)
    for widths in draw_widths(channels, 6, 8, seed=5):
        assert table.predict_ms(widths) == pytest.approx(sampler.total(widths), rel=0.08)
    again = LatencyTable.from_json(table.to_json())
    assert again.estimated == table.estimated
    assert again.error == pytest.approx(table.error, abs=1e-3)
