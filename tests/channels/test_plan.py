"""Pruning plans from scores and a budget, and costs of widths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from passdeploy.channels.allocation import (
    Budget,
    _add_what_fits,
    _greedy,
    _steps_best_first,
    _with_first,
    choose_channels,
    narrowest_widths,
)
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan, reconcile
from passdeploy.channels.widths import width_step
from passdeploy.errors import BudgetError, PlanError, UsageError
from passdeploy.grouping.find import map_channels
from tests import nets

IMAGES = torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="module")
def residual() -> ChannelMap:
    return map_channels(nets.Residual(), IMAGES)


def scores_of(channels: ChannelMap, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.width, generator=generator) for group in channels.prunable}


@pytest.mark.parametrize("kind", ["macs", "params", "channels"])
@pytest.mark.parametrize("share", [0.4, 0.5, 0.8])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_plan_keeps_to_its_budget_and_uses_it(residual: ChannelMap, kind: str, share: float, allocation: str):
    budget = Budget.of(kind, share, residual.costs)
    plan = choose_channels(
        scores_of(residual), residual.groups, residual.costs, budget, round_to=1, allocation=allocation
    )
    spent = residual.costs.of(kind, plan.widths())
    assert spent <= budget.limit
    assert spent > 0.7 * budget.limit


def test_no_expensive_channel_is_cut_for_a_little_that_cheap_ones_can_save(residual: ChannelMap):
    """A channel of the stream is worth the least for its cost, but cutting one saves far more than is asked."""
    costs = residual.costs
    channel_cost = dict(zip(costs.widths, costs.cost_of("macs").gradient(costs.vector({})), strict=True))
    assert channel_cost["stem.0"] > 1.5 * channel_cost["inner.0.0.0"]
    scores = {
        group.name: torch.full((group.width,), channel_cost[group.name] * (1.0 if group.name == "stem.0" else 1.1))
        for group in residual.prunable
    }
    limit = int(costs.of("macs") - channel_cost["inner.0.0.0"])
    plan = choose_channels(scores, residual.groups, costs, Budget("macs", limit), round_to=1)
    assert len(plan.kept["stem.0"]) == 8
    assert costs.of("macs", plan.widths()) > limit - channel_cost["inner.0.0.0"]


def test_one_threshold_is_shared_by_every_group(residual: ChannelMap):
    scores = {
        "stem.0": torch.tensor([0.9, 0.8, 0.7, 0.6, 0.95, 0.85, 0.75, 0.65]),
        "inner.0.0.0": torch.tensor([0.2, 0.1, 0.15, 0.3, 0.25, 0.05]),
        "inner.1.0.0": torch.tensor([0.5, 0.12, 0.91, 0.22, 0.93, 0.32]),
    }
    plan = choose_channels(
        scores,
        residual.groups,
        residual.costs,
        Budget.of("channels", 18 / 25, residual.costs),
        round_to=1,
        per_cost=False,
    )
    assert plan.kept["stem.0"] == tuple(range(8))
    assert plan.kept["inner.0.0.0"] == (3,)  # never an empty layer
    assert plan.kept["inner.1.0.0"] == (0, 2, 4, 5)


def test_the_best_channels_of_a_group_stay(residual: ChannelMap):
    scores = scores_of(residual)
    plan = choose_channels(scores, residual.groups, residual.costs, Budget.of("macs", 0.5, residual.costs), round_to=1)
    for name, kept in plan.kept.items():
        best = scores[name].argsort(descending=True)[: len(kept)]
        assert set(kept) == set(best.tolist())


@pytest.mark.parametrize("round_to", [2, 4])
def test_layer_widths_are_multiples_of_round_to(round_to: int):
    channels = map_channels(nets.Depthwise(), IMAGES)
    budget = Budget.of("macs", 0.6, channels.costs)
    plan = choose_channels(scores_of(channels), channels.groups, channels.costs, budget, round_to=round_to)
    for group in channels.prunable:
        width = len(plan.kept[group.name]) * group.span
        assert width % (round_to if group.width * group.span >= 2 * round_to else 2) == 0


def test_a_layer_narrower_than_two_steps_is_cut_in_smaller_ones():
    channels = map_channels(nets.SqueezeExcite(), IMAGES)
    squeeze = next(group for group in channels.prunable if group.name == "squeeze")
    assert (squeeze.width, width_step(squeeze, 8), width_step(squeeze, 2)) == (4, 2, 2)


def test_a_channel_that_spans_several_counts_as_several():
    channels = map_channels(nets.Grouped(), IMAGES)
    stem = next(group for group in channels.prunable if group.name == "stem.0")
    assert stem.span == 2
    budget = Budget.of("macs", 0.7, channels.costs)
    plan = choose_channels(scores_of(channels), channels.groups, channels.costs, budget, round_to=4)
    assert len(plan.kept["stem.0"]) % 2 == 0  # two channels of the group are four of the layer


def test_a_budget_below_the_narrowest_network_names_the_smallest_reachable(residual: ChannelMap):
    with pytest.raises(BudgetError, match=r"smallest that can be reached is [\d,]+ \(") as caught:
        choose_channels(
            scores_of(residual), residual.groups, residual.costs, Budget.of("macs", 0.001, residual.costs), round_to=1
        )
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("round_to", [1, 2, 8])
def test_a_budget_that_is_too_small_is_answered_with_what_can_be_changed(residual: ChannelMap, round_to: int):
    budget = Budget.of("macs", 0.001, residual.costs)
    with pytest.raises(BudgetError) as caught:
        choose_channels(scores_of(residual), residual.groups, residual.costs, budget, round_to=round_to)
    assert (f"set prune.round_to below {round_to}" in str(caught.value)) == (round_to > 1)
    smallest = residual.costs.of("macs", narrowest_widths(residual.groups, residual.costs, round_to=round_to))
    assert f"is {smallest:,} (" in str(caught.value)
    enough = Budget("macs", smallest)
    plan = choose_channels(scores_of(residual), residual.groups, residual.costs, enough, round_to=round_to)
    assert residual.costs.of("macs", plan.widths()) == smallest


def test_widths_are_multiples_of_eight_if_nothing_is_said():
    channels = map_channels(nn.Sequential(nn.Conv2d(3, 40, 1), nn.Conv2d(40, 5, 1)), IMAGES)
    budget = Budget.of("macs", 0.75, channels.costs)
    plan = choose_channels(scores_of(channels), channels.groups, channels.costs, budget)
    assert plan.widths() == {"0": 24}


def test_amounts_up_to_one_are_shares(residual: ChannelMap):
    whole = residual.costs.of("macs")
    assert [Budget.of("macs", amount, residual.costs).limit for amount in (0.5, 1, 1.5, 7)] == [whole // 2, whole, 1, 7]


def test_score_per_cost_prefers_cheap_channels(residual: ChannelMap):
    equal = {group.name: torch.full((group.width,), 0.5) for group in residual.prunable}
    budget = Budget.of("macs", 0.5, residual.costs)
    plan = choose_channels(equal, residual.groups, residual.costs, budget, round_to=1, per_cost=True)
    shares = {g.name: len(plan.kept[g.name]) / g.width for g in residual.prunable}
    assert shares["stem.0"] < shares["inner.0.0.0"]  # the stream costs more than a block's inside


def test_a_channel_costs_what_it_costs_at_the_widths_that_are_given(residual: ChannelMap):
    equal = {group.name: torch.full((group.width,), 0.5) for group in residual.prunable}
    budget = Budget.of("macs", 0.5, residual.costs)
    narrow = {group.name: 1 for group in residual.prunable if group.name != "stem.0"}
    plans = [
        choose_channels(equal, residual.groups, residual.costs, budget, round_to=1, priced_at=widths)
        for widths in (None, {}, narrow)
    ]
    assert plans[0] == plans[1]
    assert len(plans[2].kept["stem.0"]) > len(plans[0].kept["stem.0"])  # layers on the stream are narrow: it is cheap


def test_the_gradient_of_a_cost_is_its_slope(residual: ChannelMap):
    full = residual.costs.vector({})
    for position in range(len(full)):
        fewer = full.copy()
        fewer[position] -= 1
        slope = residual.costs.macs.value(full) - residual.costs.macs.value(fewer)
        assert residual.costs.macs.gradient(full)[position] in (0, pytest.approx(slope, rel=0.2))


def test_masks_per_layer_are_reconciled_over_a_stream(residual: ChannelMap):
    wants = {"stem.0": [0, 1, 2], "inner.0.1.0": [1, 2, 3], "inner.1.1.0": [2, 3, 4], "inner.0.0.0": [0, 5]}
    masks = {layer: torch.zeros(8 if layer != "inner.0.0.0" else 6, dtype=torch.bool) for layer in wants}
    for layer, kept in wants.items():
        masks[layer][kept] = True
    union = Plan.of_masks(reconcile(masks, residual.groups, how="union"))
    assert union.kept == {"stem.0": (0, 1, 2, 3, 4), "inner.0.0.0": (0, 5)}
    both = Plan.of_masks(reconcile(masks, residual.groups, how="intersection"))
    assert both.kept == {"stem.0": (2,), "inner.0.0.0": (0, 5)}
    scores = reconcile({name: mask.float() for name, mask in masks.items()}, residual.groups, how="mean")
    torch.testing.assert_close(scores["stem.0"], torch.tensor([1, 2, 3, 2, 1, 0, 0, 0]) / 3)
    with pytest.raises(PlanError, match="no layer 'steem'"):
        reconcile({"steem": torch.ones(8)}, residual.groups)
    with pytest.raises(PlanError, match="at least 8 channels, but 7 values"):
        reconcile({"stem.0": torch.ones(7)}, residual.groups)
    with pytest.raises(UsageError, match="how='unoin'"):
        reconcile({"stem.0": torch.ones(8)}, residual.groups, how="unoin")


def test_an_unknown_allocation_is_refused(residual: ChannelMap):
    scores = {group.name: torch.ones(group.width) for group in residual.prunable}
    with pytest.raises(UsageError, match="allocation='unifrom'"):
        choose_channels(scores, residual.groups, residual.costs, Budget("macs", 1), allocation="unifrom")


def test_what_still_fits_is_added_where_a_better_step_is_too_dear():
    costs, tried = np.array([5, 10, 1]), []

    def value(choice: np.ndarray) -> float:
        tried.append(choice.tolist())
        return float(choice @ costs)

    scores = [np.array([9.0]), np.array([8.0, 7.0, 6.0]), np.array([3.0, 5.0])]
    steps = _steps_best_first(scores)
    assert _greedy(
        steps, np.zeros(3, np.int64), value, 7.0, score=lambda choice: float(choice @ [45, 80, 3])
    ).tolist() == [1, 0, 2]
    assert tried.count([1, 1, 0]) == 2  # by the bisection and after it: then the group is done


def test_a_block_is_kept_at_narrow_widths_rather_than_skipped_for_wide_ones():
    """Item 1 is inside of the block that is item 2: it costs nothing while the block is skipped."""
    steps = np.array([0, 0, 1, 1, 1, 2])  # after the first, which is all that fits with them

    def value(choice: np.ndarray) -> float:
        return float(4 * choice[0] + choice[2] * (1 + 2 * choice[1]))

    assert _add_what_fits(np.array([1, 0, 0]), steps[1:], value, 7.0).tolist() == [1, 1, 1]
    assert _add_what_fits(np.array([1, 0, 0]), steps[1:], value, 4.0).tolist() == [1, 3, 0]


def test_a_latency_that_falls_and_rises_again_stays_within_its_limit():
    times = [10, 9, 30, 60]  # of a group by its width: a whole block of channels takes less than a part of one
    steps = np.zeros(3, np.int64)
    assert _add_what_fits(np.zeros(1, np.int64), steps, lambda choice: times[choice[0]], 15.0).tolist() == [1]
    assert _add_what_fits(np.zeros(1, np.int64), steps, lambda choice: times[choice[0]], 60.0).tolist() == [3]


def test_what_is_kept_comes_first():
    steps = np.array([2, 0, 0, 1, 2, 0])
    assert _with_first(steps, np.array([2, 0, 1])).tolist() == [2, 0, 0, 1, 2, 0]
    assert _with_first(steps, np.array([0, 1, 2])).tolist() == [2, 1, 2, 0, 0, 0]
