"""Sampling on a machine of varying speed, and at the networks that planners choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count

import pytest

from passdeploy.channels.groups import ChannelMap
from passdeploy.latency.network_timing import NetworkTiming
from tests.profiling.fakes import FakeRunner

from .fakes import QUICK, FakeSampler, chain, table_of


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


def test_the_last_measurements_are_of_plans(channels: ChannelMap):
    table = table_of(FakeSampler(), channels, replace(QUICK, target_shares=(0.7, 0.4)))
    assert len(table.measurements) == QUICK.networks + 2
    for (_, ms), share in zip(table.measurements[-2:], (0.7, 0.4), strict=True):
        assert 0.85 * share <= ms / table.dense_ms <= 1.05 * share


def test_a_share_that_cannot_be_reached_is_left_out(channels: ChannelMap):
    table = table_of(FakeSampler(), channels, replace(QUICK, target_shares=(0.01,)))
    assert len(table.measurements) == QUICK.networks
