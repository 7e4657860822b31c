"""Taylor importance as a running average, and weights that are co-trained with the masks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passdeploy.channels.allocation import Budget, choose_channels
from passdeploy.channels.plan import Plan
from passdeploy.errors import TrainingError
from passdeploy.grouping.find import map_channels
from passdeploy.recipe import OptimizerSpec
from passdeploy.sparsity.importance import TaylorImportance
from passdeploy.sparsity.learn import Learned, PassSettings, learn_masks
from passdeploy.sparsity.objective import MaskObjective
from tests import nets
from tests.sparsity.test_learn import IMAGE, HalfUseless, stripes

BATCHES = [stripes(32, seed) for seed in range(4)]


def learn(net: nn.Module, **settings: object) -> Learned:
    channels = map_channels(net, IMAGE)
    chosen_settings = PassSettings(**{"steps": 12, "round_to": 1, "prompt_size": 1, "hidden": 8, **settings})
    return learn_masks(net, channels.groups, BATCHES, F.cross_entropy, costs=channels.costs, settings=chosen_settings)


def test_importance_is_a_running_average_of_squared_gradients():
    importance = TaylorImportance(torch.tensor([1.0, 4.0]), memory=0.75)
    importance.update_(torch.tensor([3.0, 0.0]))
    assert importance.scores.tolist() == [0.75 + 0.25 * 9, 3.0]


def test_a_removed_channel_keeps_its_importance_and_ranks_behind_all_others():
    importance = TaylorImportance(torch.tensor([9.0, 5.0, 1e-3]), memory=0.5)
    importance.set_kept_(torch.tensor([False, True, True]))
    importance.update_(torch.zeros(3))
    assert importance.scores[:2].tolist() == [9.0, 2.5]
    logits = importance.logits()
    assert logits[0] < logits[2] < logits[1]


def test_logits_are_proportional_to_the_importance_and_can_be_loaded():
    importance = TaylorImportance(torch.tensor([1.0, 0.01, 0.001]), memory=0.5)
    scores = importance.logits().sigmoid()
    assert (scores[1] / scores[2]).item() == pytest.approx(10, rel=0.01)
    assert (scores[0] / scores[1]).item() == pytest.approx(100, rel=0.15)
    other = TaylorImportance(torch.zeros(3), memory=0.5)
    other.load_logits_(importance.logits())
    torch.testing.assert_close(other.scores, importance.scores)


def test_weights_are_co_trained_and_the_network_itself_stays():
    net = HalfUseless().eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    kept = learn(net, weights="trained", weights_optimizer=OptimizerSpec(lr=0.1, weight_decay=0.0)).weights
    assert kept is not None
    assert not torch.equal(kept.head.bias, net.head.bias)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert learn(net, weights="rehearsed").weights is None
    assert learn(net, weights="frozen").weights is None


def test_frozen_parameters_stay_while_the_others_are_co_trained():
    net = HalfUseless().eval()
    net.head.weight.requires_grad_(False)
    kept = learn(net, weights="trained").weights
    assert kept is not None
    assert torch.equal(kept.head.weight, net.head.weight)
    assert not torch.equal(kept.head.bias, net.head.bias)


def test_co_trained_weights_lower_the_loss_at_the_final_budget():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nets.randomise_(nets.SqueezeExcite())
        net.head.fc = nn.Linear(6, 3)
    losses = {
        weights: learn(net, weights=weights, steps=60, anneal=0.5).losses[-10:] for weights in ("frozen", "trained")
    }
    assert sum(losses["trained"]) < 0.9 * sum(losses["frozen"])


def test_a_rate_at_which_weights_diverge_is_an_error_that_names_the_step():
    with pytest.raises(TrainingError, match="of mask learning") as caught:
        learn(HalfUseless().eval(), weights_optimizer=OptimizerSpec(lr=1e20), steps=30)
    assert len(str(caught.value).splitlines()) <= 3


def objective_of(net: nn.Module, kind: str = "macs", **settings: object) -> MaskObjective:
    channels = map_channels(net, IMAGE)
    costs = replace(channels.costs, latency=channels.costs.macs)  # a nanosecond for a multiply-add
    budget = Budget.of(kind, 0.5, costs)
    chosen_settings = PassSettings(**{"round_to": 1, **settings})
    return MaskObjective(net, channels.prunable, F.cross_entropy, costs, budget, chosen_settings, net)


def test_a_plan_prices_channels_between_dense_widths_and_those_left_and_by_a_latency_in_the_dense_network(
    monkeypatch: pytest.MonkeyPatch,
):
    prices = []

    def choose(*args: Any, priced_at: dict[str, int] | None, **options: Any) -> Plan:
        if priced_at not in prices:
            prices.append(priced_at)
        return choose_channels(*args, priced_at=priced_at, **options)

    monkeypatch.setattr("passdeploy.sparsity.objective.choose_channels", choose)
    objective = objective_of(HalfUseless().eval())
    channels, dense = objective.network.channels, objective.dense_cost
    widths = {name: len(mask) for name, mask in channels.split(objective.network.kept).items()}
    plan = objective.plan(torch.rand(channels.total), int(0.9 * dense))
    objective.network.shrink_(plan)
    objective.plan(torch.rand(channels.total), int(0.7 * dense))
    left = plan.widths()
    assert prices == [widths, {name: round((widths[name] * left[name]) ** 0.5) for name in widths}]
    assert prices[1] != widths
    timed = objective_of(HalfUseless().eval(), kind="latency")
    timed.plan(torch.rand(channels.total), int(0.9 * dense))
    assert prices[2] is None


def test_expensive_channels_are_removed_on_the_way_but_not_at_the_end_where_cheap_ones_do():
    """Late plans save little each, for which a few cheap channels are always enough."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    objective = objective_of(net)
    cost = objective._costs.cost_of("macs")
    expensive, cheap = cost.gradient(objective._costs.vector({}))[:2].tolist()
    assert expensive > 2 * cheap
    scores = torch.cat([torch.full((8,), 1.0 * expensive), torch.full((4,), 1.1 * cheap)])  # by cost: 1.0 and 1.1

    def widths_at(limit: float) -> list[int]:
        return list(objective.plan(scores, int(limit)).widths().values())

    assert widths_at(objective.dense_cost - cheap) == [7, 4]
    objective.budget = Budget("macs", int(objective.dense_cost - cheap))
    assert widths_at(objective.budget.limit) == [8, 3]


def test_the_budget_falls_fast_at_first_and_is_met_before_the_end():
    objective = objective_of(HalfUseless().eval(), steps=100, anneal=0.8)
    limits = [objective.limit_at(step) for step in range(100)]
    assert limits == sorted(limits, reverse=True)
    assert limits[79:] == [objective.limit_at(100)] * 21
    assert objective.dense_cost - limits[39] > 0.8 * (objective.dense_cost - limits[99])


@pytest.mark.parametrize(("steps", "anneal"), [(300, 0.9), (1500, 0.9), (60, 1.0), (7, 0.5), (40, 0.0), (0, 0.9)])
def test_few_steps_make_a_plan_and_the_target_is_met_when_it_is_due(steps: int, anneal: float):
    objective = objective_of(HalfUseless().eval(), steps=steps, anneal=anneal)
    planned = {step: limit for step, limit in enumerate(objective.plan_limits()) if limit is not None}
    dense, target = objective.dense_cost, objective.limit_at(steps)
    assert all(limit == objective.limit_at(step) for step, limit in planned.items())
    due = [step for step in range(steps) if objective.limit_at(step) == target]
    assert [step for step, limit in planned.items() if limit == target] == due[:1]
    assert len(planned) <= max(40, steps // 10)
    left = [dense - target, *(limit - target for limit in planned.values())]
    assert all(later >= 0.8 * earlier - 0.01 * dense for earlier, later in pairwise(left)) or steps < 100
