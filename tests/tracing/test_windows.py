"""Convolutions written out: windows unfolded and folded, and kernels that sample computed places."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

import passdeploy as pd

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Unfolded(nn.Module):
    """A convolution as a linear layer of windows; its patches are put together again where `folds`."""

    def __init__(self, *, folds: bool) -> None:
        super().__init__()
        self.stem, self.head, self.folds = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(8, 5), folds
        self.patches = nn.Linear(6 * 4, 8 * (4 if folds else 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        windows = self.patches(F.unfold(x, 2, stride=2).mT).relu()
        if self.folds:
            return self.head(F.fold(windows.mT, x.shape[-2:], 2, stride=2).mean((2, 3)))
        return self.head(windows.mean(1))


class Involution(nn.Module):
    """A kernel for each position, shared by all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.kernel, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 9, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        batch, channels, height, width = x.shape
        windows = F.unfold(x, 3, padding=1).view(batch, channels, 9, height, width)
        return self.head((windows * self.kernel(x).softmax(1)[:, None]).sum(2).mean((2, 3)))


class Deformable(nn.Module):
    """A deformable convolution with computed offsets."""

    def __init__(self, groups: int = 1, offset_groups: int = 1, *, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.offsets, self.scores = nn.Conv2d(8, 18 * offset_groups, 3, padding=1), nn.Conv2d(8, 9 * offset_groups, 1)
        self.layer, self.head = DeformConv2d(8, 12, 3, padding=1, groups=groups, bias=bias), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.layer(x, self.offsets(x), self.scores(x).sigmoid()).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "cut"),
    [
        (lambda: Unfolded(folds=False), {"stem": 6, "patches": 8}),
        (lambda: Unfolded(folds=True), {"stem": 6, "patches": 8}),
        (Involution, {"stem": 6}),
        (Deformable, {"stem": 8, "layer": 12}),
        (lambda: Deformable(bias=False), {"stem": 8, "layer": 12}),
        (lambda: Deformable(groups=4), {"stem": 4}),
        (lambda: Deformable(groups=2), {"stem": 4, "layer": 6}),
        (lambda: Deformable(offset_groups=2), {"layer": 12}),
    ],
    ids=["unfold", "fold", "involution", "deformable", "no bias", "4 groups", "2 groups", "2 groups of offsets"],
)
def test_channels_are_followed_through_windows(make, cut: dict[str, int]):
    torch.manual_seed(0)
    network = make().eval()
    groups = pd.find_groups(network, IMAGES)
    assert {group.name: group.width for group in groups if group.is_prunable} == cut
    assert all(group.reason for group in groups if not group.is_prunable)
    plan = pd.Plan({name: tuple(range(1, width, 2)) for name, width in cut.items()})
    assert pd.verify(network, groups, plan, IMAGES, tolerance=1e-5) <= 1e-5


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_deformable_convolution_states_its_new_widths(groups: int):
    network = Deformable(groups=groups).eval()
    found = pd.find_groups(network, IMAGES)
    layer = pd.slim(network, found, pd.Plan({one.name: (0,) for one in found if one.is_prunable})).layer
    assert layer.out_channels == layer.weight.size(0) < 12
    assert layer.in_channels == layer.weight.size(1) * layer.groups < 8
    assert layer.groups == (1 if groups == 4 else groups)


def test_the_multiply_adds_of_a_deformable_convolution_are_counted():
    network = Deformable(bias=False).eval()
    rest = 64 * (8 * 27 + 18 * 72 + 9 * 8) + 12 * 5
    assert pd.count(network, IMAGES[:1]).macs == rest + 64 * 12 * 72
