"""Operations one by one, between a convolution and a linear layer: followed, or protected with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import roi_align, roi_pool

import passdeploy as pd
from passdeploy.grouping.find import map_channels

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BOXES = [torch.tensor([[0.0, 0.0, 6.0, 6.0]]), torch.tensor([[1.0, 2.0, 7.0, 7.0]])]
ROWS = torch.tensor([0, 3, 5])
BACK = torch.tensor([1, 0])
GRID = 2 * torch.rand(2, 4, 4, 2, generator=torch.Generator().manual_seed(1)) - 1
FOUR = torch.ones(2, 4, 8, 8)
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


def each_a_head(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention in which every channel is a head, and places are tokens of two numbers."""
    tokens = torch.stack([x.flatten(2), x.flatten(2).square()], 3)
    return F.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=mask)


def first(x: Tensor) -> Tensor:
    """Channels in front: (channels, batch, places)."""
    return x.transpose(0, 1).flatten(2)


FOLLOWED: dict[str, tuple[Operation, int]] = {  # -> width of the group
    "gated by the other half": (lambda x: F.glu(x, 1), 4),
    "times a new tensor": (lambda x: x * x.new_ones((1,)), 8),
    "aligned regions": (lambda x: roi_align(x, BOXES[: len(x)], 3), 8),
    "pooled regions": (lambda x: roi_pool(x, BOXES[: len(x)], 3), 8),
    "selected rows": (lambda x: x.index_select(2, ROWS), 8),
    "indexed rows": (lambda x: x[:, :, ROWS], 8),
    "rows and columns by one index each": (lambda x: x[:, :, ROWS, ROWS], 8),
    "rows and columns by an index of two dimensions": (lambda x: x[:, :, ROWS[:, None], ROWS], 8),
    "columns counted from the last": (lambda x: x.index_select(-1, ROWS), 8),
    "images in another order": (lambda x: x[BACK], 8),
    "images by an index of two dimensions": (lambda x: x[BACK[None]][0], 8),
    "behind two dimensions that are indexed together": (
        lambda x: x.permute(0, 2, 1, 3)[BACK, ROWS[:2]][..., None],
        8,
    ),
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
    "products in a batch of channels": (lambda x: torch.bmm(first(x), first(x).mT).permute(1, 0, 2)[..., None], 8),
    "rows of a product": (lambda x: (x.mean((2, 3)).T @ torch.ones(2, 2)).T[..., None, None], 8),
    "rows of a sum with a product": (
        lambda x: torch.addmm(x.mean((2, 3)).T, x.mean((2, 3)).T, torch.ones(2, 2)).T[..., None, None],
        8,
    ),
    "rows times a vector": (
        lambda x: torch.mv(x.mean((2, 3)).T, torch.ones(2)).expand(2, -1)[..., None, None],
        8,
    ),
    "summed up with a vector of theirs": (
        lambda x: x * torch.mv(x.mean((2, 3)), x.mean((0, 2, 3)))[:, None, None, None],
        8,
    ),
    "a product of two vectors": (lambda x: x * torch.dot(x.mean((0, 2, 3)), x.amax((0, 2, 3))), 8),
    "others behind them cropped": (lambda x: F.pad(torch.cat([x, FOUR], 1), (0, 0, 0, 0, 0, -4)), 8),
    "others before them cropped": (lambda x: F.pad(torch.cat([FOUR, x], 1), (0, 0, 0, 0, -4, 0)), 8),
    "some before them cropped, and zeros behind": (
        lambda x: F.pad(torch.cat([FOUR, x], 1), (0, 0, 0, 0, -3, 2)),
        8,
    ),
    "rows and columns padded and cropped": (lambda x: F.pad(x, (1, 2, -1, 3)), 8),
    "images padded and cropped": (lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)), 8),
    "sampled on a grid": (lambda x: F.grid_sample(x, GRID, align_corners=False), 8),
    "pooled places": (lambda x: F.max_pool1d(x.flatten(2), 2)[..., None], 8),
    "pooled boxes": (lambda x: F.avg_pool3d(x[:, :, None], (1, 2, 2))[:, :, 0], 8),
    "places made more": (lambda x: F.interpolate(x.flatten(2), scale_factor=2)[..., None], 8),
    "boxes made more": (lambda x: F.interpolate(x[:, :, None], scale_factor=2)[:, :, 0], 8),
    "the place of a maximum in a window": (lambda x: x[..., :4, :4] * F.max_pool2d(x, 2, return_indices=True)[1], 8),
    "each a head": (each_a_head, 8),
    "each a head with a mask of its own": (
        lambda x: each_a_head(x, x.flatten(2)[:, :, None].expand(-1, -1, 64, -1)),
        8,
    ),
    "each a head with one mask for all": (lambda x: each_a_head(x, torch.ones(64, 64)), 8),
    "windows of rows": (lambda x: x.unfold(2, 3, 2).flatten(3), 8),
    "pixels as channels": (lambda x: F.pixel_unshuffle(x, 2), 8),
    "each twice": (lambda x: x.repeat_interleave(2, 1), 8),
    "the diagonal": (lambda x: x.diagonal(0, 2, 3)[..., None], 8),
    "one row and one column": (lambda x: torch.stack([x.select(2, 3), x.select(3, 1)], 2), 8),
    "the best rows": (lambda x: x * x.topk(2, 2).values.mean(2, keepdim=True), 8),
    "by the largest of all": (lambda x: x / x.abs().max(), 8),
    "by their norm": (lambda x: x / (1 + x.norm(dim=1, keepdim=True)), 8),
    "by the norm of all": (lambda x: x / x.norm(), 8),
    "softmax": (lambda x: x.softmax(1), 8),
    "their spectrum": (lambda x: torch.fft.rfft2(x).abs(), 8),
    "filtered by frequencies": (
        lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * torch.polar(torch.ones(8, 5), torch.ones(8, 5)), s=(8, 8)),
        8,
    ),
    "real and imaginary parts as channels": (
        lambda x: torch.view_as_real(torch.fft.fft(x, dim=-1).conj().resolve_conj()).movedim(-1, 2).flatten(1, 2),
        8,
    ),
    "made complex": (lambda x: torch.complex(x, 2 * x).resolve_conj().imag, 8),
    "the sum of rows": (lambda x: x.sum(2), 8),
    "times their mean": (lambda x: x * x.mean(-3, keepdim=True), 8),
    "less their mean": (lambda x: x - torch.var_mean(x, 1, keepdim=True, correction=0)[1], 8),
    "by the unbiased variance of places": (lambda x: x / (1 + x.var((2, 3), keepdim=True)), 8),
    "less their minimum": (lambda x: x - x.aminmax(dim=1, keepdim=True).min, 8),
    "normalised by the batch": (lambda x: F.batch_norm(x, None, None, training=True), 8),
    "gated rows": (lambda x: F.glu(x, 2), 8),
    "plus a map of places": (lambda x: x + torch.ones(8, 8), 8),
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
    """Multiply-adds of all images, as torch counts them; those of a fused attention torch 2.10 does not count."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(IMAGES)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    "name",
    [
        "backwards",
        "products of each two",
        "products of each two places",
        "products in a batch of channels",
        "rows of a product",
        "rows of a sum with a product",
        "each a head",
        "attention with a scale of its own",
    ],
)
def test_multiply_adds_are_those_that_torch_counts_before_and_after_a_cut(name: str):
    network = Through(FOLLOWED[name][0]).eval()
    channels = map_channels(network, IMAGES)
    assert channels.costs.of("macs") == counted(network)
    plan = pd.Plan({"stem": (1, 2, 6)})
    assert channels.costs.of("macs", plan.widths()) == counted(pd.slim(network, channels.groups, plan))


PROTECTED: dict[str, tuple[Operation, str]] = {  # -> words of the reason
    "pooled along channels": (lambda x: F.avg_pool2d(x.permute(0, 2, 3, 1), 2), "a window slides along"),
    "pooled along channels in one dimension": (
        lambda x: F.max_pool1d(x.flatten(2).mT, 2).mT[..., None],
        "a window slides along",
    ),
    "pooled along channels in three dimensions": (lambda x: F.avg_pool3d(x[:, None], 2)[:, 0], "a window slides along"),
    "channels made more": (
        lambda x: F.interpolate(x.flatten(2).mT, scale_factor=2).mT[..., None],
        "a window slides along",
    ),
    "channels, rows and columns made more": (
        lambda x: F.interpolate(x[:, None], scale_factor=2)[:, 0],
        "a window slides along",
    ),
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
    "the last one": (lambda x: x[:, -1::2], "every few of these channels are picked"),
    "a batch of channels times fixed weights": (
        lambda x: torch.bmm(first(x), torch.ones(8, 64, 3)).transpose(0, 1)[..., None],
        "meets a weight that cannot be cut",
    ),
    "fixed weights times a batch of channels": (
        lambda x: torch.bmm(torch.ones(8, 3, 2), first(x)).transpose(0, 1)[..., None],
        "belongs to an input that cannot be cut",
    ),
    "each a head with a fixed mask": (
        lambda x: each_a_head(x, torch.ones(8, 64, 64)),
        "meets a tensor whose size cannot change",
    ),
    "places as channels of a convolution": (
        lambda x: F.conv1d(x.flatten(2).mT, torch.ones(64, 1, 3), groups=64).mT[..., None],
        "a window slides along",
    ),
    "taken one by one": (lambda x: torch.stack(x.unbind(1), 1), "cannot be removed from a box"),
    "pairs of them": (
        lambda x: (x[:, None] * x[:, :, None]).flatten(1, 2),
        "two kinds of channels share one dimension",
    ),
    "selected by a mask": (lambda x: x * x.masked_select(x > 0).mean(), "picked by an index"),
    "images and columns by an index": (lambda x: x[BACK, :, ROWS[:2]][..., None], "picked by an index"),
    "sorted": (lambda x: x * x.sort(1).values, "a statistic over these channels depends on their number"),
    "multiplied up": (lambda x: x * x.prod(1, keepdim=True), "a statistic over these channels depends on their number"),
    "the logarithm of a softmax": (
        lambda x: x.log_softmax(1),
        "a statistic over these channels depends on their number",
    ),
    "an unbiased deviation of all": (lambda x: x / (1 + x.std()), "an unbiased variance"),
    "normalised by fixed statistics": (
        lambda x: F.batch_norm(x, torch.zeros(8), torch.ones(8)),
        "meets a weight that cannot be cut",
    ),
    "a group norm with a fixed scale": (
        lambda x: F.group_norm(x, 2, torch.ones(8)),
        "a statistic over these channels depends on their number",
    ),
    "of another shape in place": (
        lambda x: (x + 0).as_strided_((2, 8, 8), (512, 64, 1))[..., None],
        "given another shape in place",
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
    "their spectrum along channels": (lambda x: torch.fft.fft2(x, dim=(1, 2)).real, "a Fourier transform mixes"),
    "as complex numbers": (
        lambda x: torch.view_as_complex(x.movedim(1, -1).unflatten(-1, (4, 2)).contiguous()).abs().movedim(-1, 1),
        "",
    ),
    "regions along channels": (lambda x: roi_align(x.permute(0, 2, 1, 3), BOXES, 3), "regions are taken along"),
}


@pytest.mark.parametrize("name", PROTECTED)
def test_channels_are_protected_with_the_reason(name: str):
    operation, words = PROTECTED[name]
    torch.manual_seed(0)
    (group,) = [group for group in pd.find_groups(Through(operation).eval(), IMAGES) if group.name == "stem"]
    assert not group.is_prunable
    assert words in group.reason
