"""Operations one by one, between a convolution and a linear layer: followed, or protected with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import roi_align, roi_pool

import passdeploy as pd
from passdeploy.grouping.find import map_channels

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BOXES = [torch.tensor([[0.0, 0.0, 6.0, 6.0]]), torch.tensor([[1.0, 2.0, 7.0, 7.0]])]
ROWS = torch.tensor([0, 3, 5])
BACK = torch.tensor([1, 0])
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


def attended(x: Tensor, scale: float | None = None) -> Tensor:
    """Attention of tokens (batch, tokens, width) to each other, with a single head."""
    x = x[:, None]
    return F.scaled_dot_product_attention(x, x, x, scale=scale)[:, 0]


FOLLOWED: dict[str, tuple[Operation, int]] = {  # -> width of the group
    "gated by the other half": (lambda x: F.glu(x, 1), 4),
    "times a new tensor": (lambda x: x * x.new_ones((1,)), 8),
    "aligned regions": (lambda x: roi_align(x, BOXES, 3), 8),
    "pooled regions": (lambda x: roi_pool(x, BOXES, 3), 8),
    "selected rows": (lambda x: x.index_select(2, ROWS), 8),
    "indexed rows": (lambda x: x[:, :, ROWS], 8),
    "rows and columns by one index each": (lambda x: x[:, :, ROWS, ROWS], 8),
    "rows and columns by an index of two dimensions": (lambda x: x[:, :, ROWS[:, None], ROWS], 8),
    "columns counted from the last": (lambda x: x.index_select(-1, ROWS), 8),
    "images in another order": (lambda x: x[BACK], 8),
    "one part that is all": (lambda x: x.split(8, 1)[0], 8),
    "every other one": (lambda x: x[:, ::2], 4),
    "every other one from the second on": (lambda x: x[:, 1::2], 4),
    "backwards": (lambda x: x.flip(1), 8),
    "padded at both ends": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 1)), 8),
    "twice": (lambda x: x.repeat(1, 2, 1, 1), 8),
    "stacked before": (lambda x: torch.stack([x, 2 * x], 1).flatten(1, 2), 8),
    "stacked behind": (lambda x: torch.stack([x, 2 * x], -3).flatten(1, 2), 8),
    "beside what is not theirs": (lambda x: torch.cat([x, 2 * x, torch.ones(2, 1, 8, 8)], 1), 8),
    "put together along columns": (lambda x: torch.cat([x, 2 * x], -1), 8),
    "beside an empty tensor": (lambda x: torch.cat([x, x.new_zeros(0)], 1), 8),
    "windows unfolded and folded": (lambda x: F.fold(F.unfold(x, 2), 8, 2), 8),
    "the larger of two": (lambda x: torch.max(x, 2 * x - 1), 8),
    "by their deviation": (lambda x: x / (1 + x.std(1, unbiased=False)[:, None]), 8),
    "by their variance": (lambda x: x / (1 + x.var(1, keepdim=True, correction=0)), 8),
    "less the logarithm of a sum": (lambda x: x - x.logsumexp(1, keepdim=True), 8),
    "times their maximum": (lambda x: x * x.max(1).values[:, None], 8),
    "times their maximum, which stays a dimension": (lambda x: x * x.max(1, keepdim=True).values, 8),
    "products of each two": (lambda x: (x.flatten(2) @ x.flatten(2).mT)[..., None], 8),
    "products of each two places": (lambda x: torch.bmm(x.flatten(2).mT, x.flatten(2))[..., None], 8),
    "attention with a scale of its own": (lambda x: attended(x.flatten(2).mT, scale=0.5).mT[..., None], 8),
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
    assert pd.verify(network, groups, pd.Plan({"stem": (0,)}), IMAGES, tolerance=1e-5) <= 1e-5


def counted(network: nn.Module) -> float:
    """Multiply-adds of all images, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(IMAGES)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    "name", ["backwards", "products of each two", "products of each two places", "attention with a scale of its own"]
)
def test_multiply_adds_are_those_that_torch_counts_before_and_after_a_cut(name: str):
    network = Through(FOLLOWED[name][0]).eval()
    channels = map_channels(network, IMAGES)
    assert channels.costs.of("macs") == counted(network)
    plan = pd.Plan({"stem": (1, 2, 6)})
    assert channels.costs.of("macs", plan.widths()) == counted(pd.slim(network, channels.groups, plan))


PROTECTED: dict[str, tuple[Operation, str]] = {  # -> words of the reason
    "pooled along channels": (lambda x: F.avg_pool2d(x.permute(0, 2, 3, 1), 2), "a window slides along"),
    "windows along channels": (lambda x: F.unfold(x.permute(0, 2, 1, 3), 2), "a window slides along"),
    "channels by an index": (lambda x: x[:, torch.tensor([4, 1, 0])], "picked by an index"),
    "channels by a mask": (lambda x: x[:, torch.arange(8) % 3 > 0], "picked by an index"),
    "channels and columns by an index": (lambda x: x[:, ROWS, :, ROWS].movedim(0, 2), "picked by an index"),
    "split into unequal parts": (lambda x: torch.cat(x.split(3, 1)[1:], 1), "split into parts of unequal size"),
    "every third": (lambda x: x[:, ::3], "every few of these channels are picked"),
    "every other one from the third on": (lambda x: x[:, 2::2], "every few of these channels are picked"),
    "gathered": (lambda x: x.gather(2, torch.zeros(2, 8, 1, 8, dtype=torch.int64)), "picked by an index"),
    "selected": (lambda x: x.index_select(1, ROWS), "picked by an index"),
    "folded along channels": (
        lambda x: F.fold(x.flatten(2).mT.reshape(2, 64, 8), (3, 5), (2, 2)),
        "windows are put together along",
    ),
    "a layer norm without a scale": (
        lambda x: F.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1),
        "a statistic over these channels depends on their number",
    ),
    "a group norm without a scale": (
        lambda x: F.group_norm(x, 2),
        "a statistic over these channels depends on their number",
    ),
    "sums so far": (lambda x: x.cumsum(1), "a statistic over these channels depends on their number"),
    "an unbiased deviation": (lambda x: x / (1 + x.std(1, keepdim=True)), "an unbiased variance"),
    "the place of a maximum": (lambda x: x * x.max(1, keepdim=True).indices, "the place of a maximum"),
    "attention with the usual scale": (lambda x: attended(x.flatten(2).mT).mT[..., None], "the scale of attention"),
    "attention along channels": (lambda x: attended(x.flatten(2))[..., None], "attention runs along these channels"),
    "times fixed weights": (
        lambda x: (torch.ones(6, 8) @ x.flatten(2))[..., None],
        "belongs to an input that cannot be cut",
    ),
    "added to a fixed vector": (lambda x: x + torch.ones(8, 1, 1), "meets a tensor whose size cannot change"),
    "regions along channels": (lambda x: roi_align(x.permute(0, 2, 1, 3), BOXES, 3), "regions are taken along"),
}


@pytest.mark.parametrize("name", PROTECTED)
def test_channels_are_protected_with_the_reason(name: str):
    operation, words = PROTECTED[name]
    torch.manual_seed(0)
    (group,) = [group for group in pd.find_groups(Through(operation).eval(), IMAGES) if group.name == "stem"]
    assert not group.is_prunable
    assert words in group.reason
