"""Plans on the way to a budget."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from passdeploy.channels.allocation import Budget
from passdeploy.channels.groups import ChannelMap
from passdeploy.grouping.find import map_channels
from passdeploy.models.cifar_resnet import resnet20_cifar
from passdeploy.sparsity import objective
from passdeploy.sparsity.objective import MaskObjective
from passdeploy.sparsity.settings import PassSettings


@pytest.fixture(scope="module")
def channels() -> ChannelMap:
    return map_channels(resnet20_cifar(), torch.zeros(1, 3, 16, 16))


def shrink(channels: ChannelMap, share: float, round_to: int, seed: int, *, stream: float = 1.0) -> float:
    """Make every plan of a schedule by random scores that change a little; return the share of the budget in the last.

    Every plan must keep to its own limit. The scores of the stream are `stream` times as high.
    """
    costs = channels.costs
    budget = Budget.of("macs", share, costs)
    settings = PassSettings(steps=30, round_to=round_to, prompt_kind="none", weights="frozen")
    planned = MaskObjective(
        resnet20_cifar(), channels.prunable, F.cross_entropy, costs, budget, settings, resnet20_cifar()
    )
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(planned.network.kept.shape, generator=generator) ** 3 + 1e-3
    scores[: channels.groups[0].width] *= stream
    plan = None
    for limit in planned.plan_limits():
        if limit is not None:
            scores = scores * (1 + 0.2 * torch.rand(scores.shape, generator=generator))
            plan = planned.plan(scores, limit)
            assert costs.of("macs", plan.widths()) <= max(limit, budget.limit)
            planned.network.shrink_(plan)
    assert plan is not None
    return costs.of("macs", plan.widths()) / budget.limit


def test_coarse_widths_leave_little_of_the_budget(channels: ChannelMap, monkeypatch: pytest.MonkeyPatch):
    spent = [shrink(channels, 0.35, 16, seed, stream=100.0) for seed in range(3)]
    monkeypatch.setattr(objective, "_SPENT", 0.0)
    careless = [shrink(channels, 0.35, 16, seed, stream=100.0) for seed in range(3)]
    print(spent, careless)
    assert min(spent) > 0.95
    assert min(careless) < 0.85


def test_fine_widths_are_planned_without_care(channels: ChannelMap, monkeypatch: pytest.MonkeyPatch):
    careful = [shrink(channels, 0.3, 1, seed) for seed in range(3)]
    assert min(careful) > 0.99
    monkeypatch.setattr(objective, "_SPENT", 0.0)
    assert [shrink(channels, 0.3, 1, seed) for seed in range(3)] == careful
