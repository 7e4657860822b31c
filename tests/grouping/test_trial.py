"""A trial cuts a network once, and tells its modules other numbers as often as asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from passdeploy.channels.groups import SizeAttribute
from passdeploy.grouping.gather import GroupBuilder, LabelledSize
from passdeploy.grouping.trial import TrialCut, random_plan
from passdeploy.models.cloning import ModelCloner
from passdeploy.tracing.trace_channels import trace_channels


class Stated(nn.Module):
    """Says how wide it is, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.sizes = 8, (8, 16)
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.conv(x).mean((2, 3)))


@pytest.fixture
def trial() -> tuple[TrialCut, GroupBuilder, Tensor]:
    net = Stated().eval()
    trace = trace_channels(net, torch.zeros(1, 3, 4, 4))
    builder, labels = GroupBuilder(trace), {(state.tensor, state.dim): state.labels for state in trace.state}
    groups = builder.gather()
    return TrialCut(ModelCloner(net), trace, labels, groups, random_plan(groups, 0)), builder, labels["conv.weight", 0]


def test_numbers_are_written_and_taken_back(trial: tuple[TrialCut, GroupBuilder, Tensor]):
    tried, builder, labels = trial
    left = tried.size_of(labels)
    assert 2 <= left < 8
    first = tried.cut(builder.gather([LabelledSize(SizeAttribute("", "width", None), labels)]))
    assert (first.width, first.sizes, first.conv.out_channels) == (left, (8, 16), left)
    second = tried.cut(builder.gather([LabelledSize(SizeAttribute("", "sizes", 0), labels)]))
    assert (second.width, second.sizes) == (8, (left, 16))
    third = tried.cut(builder.gather())
    assert (third.width, third.sizes) == (8, (8, 16))
    assert first is third
    tried.forget()
    assert tried.cut(builder.gather()) is not first


def test_random_plans_cut_neighbours_differently(trial: tuple[TrialCut, GroupBuilder, Tensor]):
    groups = [replace(trial[1].gather()[0], name=str(number), width=24) for number in range(13)]
    plans = [random_plan(groups, take).kept for take in range(3)]
    assert all(8 <= len(kept) <= 15 for kept in plans[0].values())
    for plan in plans[1:]:
        assert all(abs(len(plan[str(n)]) - len(plan[str(n + 1)])) > 6 for n in range(12))
