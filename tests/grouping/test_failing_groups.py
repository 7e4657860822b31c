"""Tests of the search for the groups of a plan that make a network differ: the right ones, in few comparisons."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy import find_groups, verify
from passdeploy.channels.plan import Plan
from passdeploy.grouping.comparison import Comparison
from passdeploy.grouping.failing_groups import MAX_BISECTION_TRIALS, FailingGroups
from passdeploy.tracing.rules import movement


class FakeComparison:
    """Comparison that differs where a plan cuts all groups of one of some sets."""

    def __init__(self, *failing: AbstractSet[int]) -> None:
        self._failing, self.plans = failing, list[Plan]()

    def is_exact(self, plan: Plan) -> bool:
        self.plans.append(plan)
        return not any(together <= set(map(int, plan.kept)) for together in self._failing)


def found(comparison: FakeComparison, groups: int = 100) -> list[int]:
    plan = Plan({str(number): (0,) for number in range(groups)})
    return sorted(map(int, FailingGroups(cast(Comparison, comparison), plan).names()))


@pytest.mark.parametrize("culprit", [0, 1, 41, 98, 99])
def test_one_group_is_found_in_a_logarithm_of_comparisons(culprit: int):
    comparison = FakeComparison({culprit})
    assert found(comparison) == [culprit]
    assert len(comparison.plans) <= 9  # 7 halvings, its neighbour, and the rest


def test_neighbours_cost_one_comparison_each():
    comparison = FakeComparison(*({number} for number in range(60, 68)))
    assert found(comparison) == list(range(60, 68))
    assert len(comparison.plans) <= 7 + 7 + 2


def test_groups_far_apart_are_all_found():
    assert found(FakeComparison({3}, {50}, {97})) == [3, 50, 97]


def test_of_groups_that_differ_only_together_one_is_enough():
    assert found(FakeComparison({20, 70})) == [70]
    assert found(FakeComparison({20, 70}, {10, 71}, {5})) == [5, 70, 71]


def test_a_single_group_needs_no_comparison():
    comparison = FakeComparison({0})
    assert found(comparison, groups=1) == [0]
    assert not comparison.plans


def test_after_too_many_comparisons_all_that_is_left_is_named():
    comparison = FakeComparison(*({number} for number in range(0, 100, 2)))
    names = found(comparison)
    assert set(range(0, 100, 2)) <= set(names)
    assert len(comparison.plans) <= MAX_BISECTION_TRIALS + 2


class Float32Norm(nn.Module):
    """An RMS norm that is computed in float32 whatever the network is in, as those of language models are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * wide.to(x.dtype)


class Float32LayerNorm(nn.LayerNorm):
    """A layer norm over channels in float32 with its scale in float32, as many backbones write it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        scaled = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return scaled.to(x.dtype).movedim(-1, 1)


@pytest.mark.parametrize("norm", [Float32Norm, Float32LayerNorm])
def test_a_part_in_float32_is_no_difference(norm: type[nn.Module]):
    """In float64 such a network still differs from its masked copy by the rounding of float32."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), norm(64), nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 12, 1)
    )
    net.append(nn.PixelShuffle(2))
    images = torch.randn(2, 3, 16, 16)
    groups = find_groups(net.eval(), images)
    assert [(group.name, group.is_prunable) for group in groups if group.name in "02"] == [("0", True), ("2", True)]
    plan = Plan({"0": tuple(range(0, 64, 3)), "2": tuple(range(20))})
    assert verify(net, groups, plan, images, tolerance=1e-5) <= 1e-5


class Detector(nn.Module):
    """Boxes in pixels and scores near zero in one output; what scores are computed from is shifted over channels."""

    def __init__(self, *, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.box, self.stem = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 16, 3, padding=1)
        self.body, self.score = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 5, 1)
        nn.init.constant_(self.score.bias, -11.0)

    def forward(self, x: Tensor) -> Tensor:
        found = self.body(torch.roll(self.stem(x).relu(), self.shift, 1)).relu()
        return torch.cat([640 * self.box(x).sigmoid(), self.score(found).sigmoid()], 1)


def test_a_wrong_cut_shows_in_scores_beside_large_boxes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(movement, "_protect_rolled", lambda *_: None)  # as if nothing were known of `roll`
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    for shift, is_prunable in ((0, True), (5, False)):
        groups = {group.name: group for group in find_groups(Detector(shift=shift).eval(), images)}
        assert groups["stem"].is_prunable is is_prunable
        assert groups["body"].is_prunable
