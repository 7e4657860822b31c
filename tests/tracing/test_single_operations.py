"""Operations one by one, between a convolution and a linear layer: followed, or protected with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align, roi_pool

import passdeploy as pd

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BOXES = [torch.tensor([[0.0, 0.0, 6.0, 6.0]]), torch.tensor([[1.0, 2.0, 7.0, 7.0]])]
ROWS = torch.tensor([0, 3, 5])
Operation = Callable[[Tensor], Tensor]


class Through(nn.Module):
    """Eight channels go through an operation and are averaged; what is left of them is classified."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.stem, self.operation = nn.Conv2d(3, 8, 3, padding=1), operation
        self.head = nn.Linear(self._features(IMAGES).shape[1], 5)

    def _features(self, x: Tensor) -> Tensor:
        return self.operation(self.stem(x).relu()).flatten(2).mean(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._features(x))


FOLLOWED: dict[str, tuple[Operation, int]] = {  # -> width of the group
    "gated by the other half": (lambda x: F.glu(x, 1), 4),
    "times a new tensor": (lambda x: x * x.new_ones((1,)), 8),
    "aligned regions": (lambda x: roi_align(x, BOXES, 3), 8),
    "pooled regions": (lambda x: roi_pool(x, BOXES, 3), 8),
    "selected rows": (lambda x: x.index_select(2, ROWS), 8),
    "indexed rows": (lambda x: x[:, :, ROWS], 8),
    "rows and columns by one index each": (lambda x: x[:, :, ROWS, ROWS], 8),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_channels_are_followed(name: str):
    operation, width = FOLLOWED[name]
    torch.manual_seed(0)
    network = Through(operation).eval()
    groups = pd.find_groups(network, IMAGES)
    assert {group.name: group.width for group in groups if group.is_prunable} == {"stem": width}
    plan = pd.Plan({"stem": tuple(range(1, width, 2))})
    assert pd.verify(network, groups, plan, IMAGES, tolerance=1e-5) <= 1e-5


PROTECTED: dict[str, tuple[Operation, str]] = {  # -> words of the reason
    "pooled along channels": (lambda x: F.avg_pool2d(x.permute(0, 2, 3, 1), 2), "a window slides along"),
    "windows along channels": (lambda x: F.unfold(x.permute(0, 2, 1, 3), 2), "a window slides along"),
    "channels by an index": (lambda x: x[:, torch.tensor([4, 1, 0])], "picked by an index"),
    "channels by a mask": (lambda x: x[:, torch.arange(8) % 3 > 0], "picked by an index"),
    "channels and columns by an index": (lambda x: x[:, ROWS, :, ROWS].movedim(0, 2), "picked by an index"),
    "regions along channels": (lambda x: roi_align(x.permute(0, 2, 1, 3), BOXES, 3), "regions are taken along"),
}


@pytest.mark.parametrize("name", PROTECTED)
def test_channels_are_protected_with_the_reason(name: str):
    operation, words = PROTECTED[name]
    torch.manual_seed(0)
    (group,) = [group for group in pd.find_groups(Through(operation).eval(), IMAGES) if group.name == "stem"]
    assert not group.is_prunable
    assert words in group.reason
