"""Norms and standardised weights: the masked network takes their statistics of the channels that stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy import find_groups, masked, verify
from passdeploy.grouping.trial_cut import random_plan

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))


class Standardised(nn.Conv2d):
    """A convolution whose weights are standardised by a batch norm, as timm's are."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=self.padding)


class Twice(nn.Module):
    """A standardised convolution whose inputs and outputs are the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3), Standardised(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).sigmoid()
        return x + self.body(x)


def drawn(*layers: nn.Module) -> nn.Module:
    """A chain of layers, all of whose parameters are random."""
    draw = torch.Generator().manual_seed(0)
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-1, 1, generator=draw)
    return net.eval()


NORMED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "layer norm": (lambda: drawn(nn.Linear(6, 12), nn.Sigmoid(), nn.LayerNorm(12), nn.Linear(12, 5)), TOKENS),
    "RMS norm": (lambda: drawn(nn.Linear(6, 12), nn.Sigmoid(), nn.RMSNorm(12), nn.Linear(12, 5)), TOKENS),
    "group norm": (
        lambda: drawn(nn.Conv2d(3, 12, 3), nn.Sigmoid(), nn.GroupNorm(2, 12), nn.Conv2d(12, 5, 1)),
        IMAGES,
    ),
    "standardised weights": (
        lambda: drawn(
            Standardised(3, 8, 3), nn.Sigmoid(), Standardised(8, 10, 3), nn.Sigmoid(), Standardised(10, 5, 3)
        ),
        IMAGES,
    ),
    "standardised weights with one group in both dimensions": (lambda: drawn(Twice(), nn.Conv2d(8, 5, 1)), IMAGES),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("make", "inputs"), NORMED.values(), ids=NORMED)
def test_norms_go_over_the_channels_that_stay(make: Callable[[], nn.Module], inputs: Tensor, seed: int):
    net = make()
    groups = find_groups(net, inputs)
    plan = random_plan(groups, seed)
    assert plan.kept
    assert verify(net, groups, plan, inputs, tolerance=1e-5) <= 1e-5
    reference, plain = masked(net, groups, plan), masked(net, groups, plan)
    plain._forward_pre_hooks.clear()
    plain._forward_hooks.clear()
    assert not torch.allclose(reference(inputs), plain(inputs), atol=1e-4)  # the statistics are others
