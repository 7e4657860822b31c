from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from passdeploy.channels.allocation import Budget, cheapest_widths, choose_channels, narrowest_widths, smallest_plan
from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.widths import candidate_widths
from passdeploy.errors import BudgetError
from passdeploy.latency.knapsack import allocate
from passdeploy.latency.latency_cost import with_latency

from .fakes import FakeSampler, chain, table_of


@pytest.fixture(scope="module")
def channels() -> ChannelMap:
    return chain()


@pytest.fixture(scope="module")
def costs(channels: ChannelMap) -> CostModel:
    table = table_of(FakeSampler(), channels)
    return with_latency(channels.costs, table)


@pytest.fixture(scope="module")
def scores(channels: ChannelMap) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {g.name: torch.rand(g.width, generator=generator) ** 3 for g in channels.prunable}


@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_the_knapsack_is_nearly_as_good_as_trying_everything(
    share: float, channels: ChannelMap, costs: CostModel, scores: dict[str, torch.Tensor]
):
    groups = channels.prunable
    limit = int(share * costs.of("latency"))
    plan = allocate(scores, groups, costs, limit, round_to=8)
    kept = sum(float(scores[name][list(channels)].sum()) for name, channels in plan.kept.items())
    best = 0.0
    for widths in product(*(candidate_widths(group, 8, is_strict=True).tolist() for group in groups)):
        named = dict(zip((group.name for group in groups), widths, strict=True))
        if costs.of("latency", named) <= limit:
            best = max(best, sum(float(scores[n].sort(descending=True).values[:w].sum()) for n, w in named.items()))
    assert costs.of("latency", plan.widths()) <= limit
    assert kept >= 0.98 * best


def test_the_best_channels_stay_in_whole_blocks(
    channels: ChannelMap, costs: CostModel, scores: dict[str, torch.Tensor]
):
    plan = allocate(scores, channels.prunable, costs, int(0.5 * costs.of("latency")), round_to=16)
    for name, kept in plan.kept.items():
        assert len(kept) % 16 == 0
        assert set(kept) == set(scores[name].topk(len(kept)).indices.tolist())


def test_what_cannot_be_reached_names_what_can(channels: ChannelMap, costs: CostModel, scores: dict[str, torch.Tensor]):
    with pytest.raises(BudgetError, match=r"the fastest that can be reached is 0\.\d+ ms \(\d+\.\d %\)"):
        allocate(scores, channels.prunable, costs, int(0.01 * costs.of("latency")), round_to=16)


def test_learning_chooses_by_score_per_time(channels: ChannelMap, costs: CostModel):
    """Check that of groups with equal scores the one with the slowest channels loses the most."""
    scores = {g.name: torch.linspace(1, 2, g.width) for g in channels.prunable}
    budget = Budget("latency", int(0.6 * costs.of("latency")))
    plan = choose_channels(scores, channels.prunable, costs, budget, round_to=8)
    assert costs.of("latency", plan.widths()) <= budget.limit
    channel_cost = costs.cost_of("latency").gradient(costs.vector({}))
    shares = {g.name: len(plan.kept[g.name]) / g.width for g in channels.prunable}
    slowest, fastest = max(zip(channel_cost, shares, strict=False))[1], min(zip(channel_cost, shares, strict=False))[1]
    assert shares[slowest] < shares[fastest]


def test_a_layer_of_less_than_a_block_goes_in_halves(channels: ChannelMap):
    wide, narrow = channels.prunable[0], replace(channels.prunable[0], width=12)
    assert candidate_widths(wide, 16, is_strict=True).tolist() == [16, 32, 48, 64]
    assert candidate_widths(narrow, 16, is_strict=True).tolist() == [4, 8, 12]
    assert candidate_widths(replace(wide, width=40), 16, is_strict=True).tolist() == [16, 32, 40]


class SlowWhenNarrow:
    """Latency of two layers, of which the first takes longest with the fewest channels, as other kernels run then."""

    def value(self, widths: np.ndarray) -> int:
        return int({4: 100, 8: 20, 12: 30}[int(widths[0])] + widths[1])

    def gradient(self, widths: np.ndarray) -> np.ndarray:
        return np.ones(len(widths))

    def curve(self, widths: np.ndarray, group: int, candidates: np.ndarray) -> np.ndarray:
        others = np.tile(widths, (len(candidates), 1))
        others[:, group] = candidates
        return np.array([self.value(row) for row in others])


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_latency_that_only_wider_layers_reach_is_not_refused(allocation: str):
    channels = chain((12, 64))
    costs, groups = replace(channels.costs, latency=SlowWhenNarrow()), channels.prunable
    narrowest = narrowest_widths(groups, costs, round_to=16, kind="latency")
    assert (costs.of("latency"), costs.of("latency", narrowest)) == (94, 116)
    assert cheapest_widths(groups, costs, round_to=16, kind="latency") == {"0": 8, "2": 16}
    scores = {group.name: torch.ones(group.width) for group in groups}
    for limit in (55, 70):
        budget = Budget("latency", limit)
        smallest_plan(groups, costs, budget, round_to=16)
        plan = choose_channels(scores, groups, costs, budget, round_to=16, allocation=allocation)
        assert limit - 16 < costs.of("latency", plan.widths()) <= limit
    with pytest.raises(BudgetError, match="smallest that can be reached"):
        choose_channels(scores, groups, costs, Budget("latency", 35), round_to=16, allocation=allocation)


def test_a_share_of_every_group_that_costs_too_much_is_refused():
    """Check that a uniform plan keeps to its budget where only another plan would meet it."""
    channels = chain((12, 64))
    costs, groups = replace(channels.costs, latency=SlowWhenNarrow()), channels.prunable
    scores = {group.name: torch.ones(group.width) for group in groups}
    assert choose_channels(scores, groups, costs, Budget("latency", 36), round_to=16).widths() == {"0": 8, "2": 16}
    with pytest.raises(BudgetError, match="smallest that can be reached"):
        choose_channels(scores, groups, costs, Budget("latency", 36), round_to=16, allocation="uniform")
