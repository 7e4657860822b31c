from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from benchmarks.fastest_widths import fastest_widths, macs_along
from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.widths import candidate_widths
from passdeploy.errors import BudgetError
from passdeploy.latency.latency_cost import LatencyCost
from tests.latency.fakes import FakeSampler, chain, table_of


def layer_ms(inputs: int, outputs: int) -> float:
    """Compute milliseconds: multiply-adds take five times as long after the first convolution as in it."""
    return (0.02 + 1e-4 * inputs * outputs) * (5.0 if inputs > 3 else 1.0)


@pytest.fixture(scope="module")
def channels() -> ChannelMap:
    return chain()


@pytest.fixture(scope="module")
def costs(channels: ChannelMap) -> CostModel:
    latency = LatencyCost(table_of(FakeSampler(layer_ms), channels), channels.costs.widths)
    return replace(channels.costs, latency=latency)


def test_the_curve_of_one_group_is_what_counting_says(costs: CostModel):
    widths = costs.vector({"0": 40, "2": 56})
    column, candidates = list(costs.widths).index("2"), np.array([8, 48, 96])
    counts = macs_along(costs.macs, widths, column, candidates)
    assert counts.tolist() == [costs.of("macs", {"0": 40, "2": int(width)}) for width in candidates]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_as_many_are_kept_as_asked_in_nearly_the_least_time(share: float, costs: CostModel, channels: ChannelMap):
    macs = int(share * costs.of("macs"))
    found = fastest_widths(costs, channels.groups, macs, round_to=8)
    assert costs.of("macs", found) >= macs
    candidates = {group.name: candidate_widths(group, 8, is_strict=True).tolist() for group in channels.prunable}
    everything = [dict(zip(candidates, widths, strict=True)) for widths in product(*candidates.values())]
    least = min(costs.of("latency", widths) for widths in everything if costs.of("macs", widths) >= macs)
    assert costs.of("latency", found) <= 1.05 * least


def test_every_group_keeps_its_least(costs: CostModel, channels: ChannelMap):
    macs = int(0.5 * costs.of("macs"))
    found = fastest_widths(costs, channels.groups, macs, round_to=8, least=0.6)
    assert costs.of("macs", found) >= macs
    assert all(found[group.name] >= 0.6 * group.width for group in channels.prunable)
    assert costs.of("latency", found) >= costs.of("latency", fastest_widths(costs, channels.groups, macs, round_to=8))


def test_more_than_there_are_cannot_be_kept(costs: CostModel, channels: ChannelMap):
    with pytest.raises(BudgetError, match="the dense network has"):
        fastest_widths(costs, channels.groups, costs.of("macs") + 1, round_to=8)
