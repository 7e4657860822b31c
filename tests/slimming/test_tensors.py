"""What a cut leaves can be cut again: the same as one cut of both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passdeploy import Plan, slim, verify
from passdeploy.grouping.find import map_channels
from passdeploy.grouping.trial_cut import random_plan
from passdeploy.slimming.tensors import groups_after
from tests import nets

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class ManyGroups(nn.Module):
    """Twelve groups of ten channels each: fewer groups than channels of one, once half of them have gone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 120, 3), nn.GroupNorm(12, 120)
        self.grouped, self.head = nn.Conv2d(120, 120, 3, groups=12), nn.Conv2d(120, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps of five classes."""
        return self.head(self.grouped(self.norm(self.stem(x)).relu()).relu())


class WithStatistics(nn.Module):
    """A softmax and a norm over channels of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 12, 1), nn.Conv2d(20, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps of five classes."""
        both = torch.cat([self.one(x), self.other(x)], 1).softmax(1)
        return self.head(both * (1 + both.norm(dim=1, keepdim=True)))


@pytest.mark.parametrize(
    "kind", [ManyGroups, WithStatistics, nets.Grouped, nets.Depthwise, nets.Shuffled, nets.PaddedShortcut, nets.Tied]
)
def test_a_cut_of_a_cut_is_exact_and_is_one_cut_of_both(kind: type[nn.Module]):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nets.randomise_(kind()).eval()
    groups = map_channels(net, IMAGES.float()).groups
    net = net.double()
    first = random_plan(groups, 0)
    once, left = slim(net, groups, first), groups_after(groups, first)
    second = Plan({group.name: tuple(range(1, group.width)) for group in left if group.is_prunable})
    assert second.kept
    assert verify(once, left, second, IMAGES, tolerance=1e-12) < 1e-12
    both = Plan(
        {
            group.name: tuple(
                torch.tensor(first.kept.get(group.name, range(group.width)))[
                    list(second.kept.get(group.name, range(after.width)))
                ].tolist()
            )
            for group, after in zip(groups, left, strict=True)
            if group.is_prunable
        }
    )
    with torch.no_grad():
        torch.testing.assert_close(slim(once, left, second)(IMAGES), slim(net, groups, both)(IMAGES))
