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
from passdeploy.latency.cost import LatencyCost
from tests.latency.fakes import FakeProber, chain, table_of


def law(inputs: int, outputs: int) -> float:
    """Multiply-adds of the second and third convolution take five times as long as those of the first."""
    return (0.02 + 1e-4 * inputs * outputs) * (5.0 if inputs > 3 else 1.0)


@pytest.fixture(scope="module")
def channels() -> ChannelMap:
    return chain()


@pytest.fixture(scope="module")
def costs(channels: ChannelMap) -> CostModel:
    price = LatencyCost(table_of(FakeProber(law), channels), list(channels.costs.widths))
    return replace(channels.costs, latency=price)


def test_the_curve_of_one_group_is_what_counting_says(costs: CostModel):
    widths = costs.vector({"0": 40, "2": 56})
    column, rungs = list(costs.widths).index("2"), np.array([8, 48, 96])
    found = macs_along(costs.macs, widths, column, rungs)
    assert found.tolist() == [costs.of("macs", {"0": 40, "2": int(width)}) for width in rungs]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_as_many_are_kept_as_asked_in_nearly_the_least_time(share: float, costs: CostModel, channels: ChannelMap):
    macs = int(share * costs.of("macs"))
    found = fastest_widths(costs, channels.groups, macs, round_to=8)
    assert costs.of("macs", found) >= macs
    ladders = {group.name: candidate_widths(group, 8, is_strict=True).tolist() for group in channels.prunable}
    everything = [dict(zip(ladders, widths, strict=True)) for widths in product(*ladders.values())]
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
