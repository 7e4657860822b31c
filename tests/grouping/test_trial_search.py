"""Sizes that the model's code states: attributes follow the widths, and constants in the code protect channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.grouping.find import find_groups
from passdeploy.slimming.slim import slim
from passdeploy.slimming.verify import verify
from tests import nets

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(0))


def cut(net: nn.Module, inputs: Tensor) -> tuple[dict[str, ChannelGroup], nn.Module]:
    """Remove every second channel and return the groups and the slim network; fails unless it is exact."""
    net.eval()
    groups = find_groups(net, inputs)
    plan = Plan({group.name: tuple(range(0, group.width, 2)) for group in groups if group.is_prunable})
    assert plan.kept
    assert verify(net, groups, plan, inputs, tolerance=1e-5) <= 1e-5
    return {group.name: group for group in groups}, slim(net, groups, plan)


class StoredSplit(nn.Module):
    """A network that keeps the sizes of a split as a list, as MixNet does."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.stem = nets.conv_bn(3, sum(sizes))
        self.parts = nn.ModuleList(nets.conv_bn(size, size, groups=size) for size in sizes)
        self.head = nets.Head(sum(sizes))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.stem(x), self.sizes, dim=1)
        return self.head(torch.cat([part(x) for part, x in zip(self.parts, parts, strict=True)], dim=1))


def test_split_sizes_in_an_attribute_follow_the_widths():
    groups, smaller = cut(StoredSplit((6, 4)), IMAGES)
    assert [group.width for group in groups.values() if group.is_prunable] == [6, 4]
    assert smaller.sizes == [3, 2]


class Attention(nn.Module):
    """Self-attention with one projection and an attribute for its heads, written out or as one fused call."""

    def __init__(self, width: int = 24, heads: int = 6, *, fused: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.fused = heads, width // heads, fused
        self.qkv, self.proj, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))).mean(1)


def test_attention_whose_scale_depends_on_the_head_width_loses_whole_heads():
    groups, smaller = cut(Attention(fused=True), TOKENS)
    assert groups["qkv"].width == 6
    assert groups["qkv"].span == 12
    assert smaller.heads == 3
    assert smaller.qkv.out_features == 36


def test_attention_that_is_written_out_is_cut_exactly():
    groups, smaller = cut(Attention(fused=False), TOKENS)
    assert any(group.is_prunable and group.name.startswith("qkv") for group in groups.values())
    assert smaller.proj.in_features == 12


def test_a_multihead_attention_module_stays_and_its_neighbours_do_not():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(24), nn.MultiheadAttention(24, 4, batch_first=True)
            self.mlp = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
            self.out = nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            return self.out(x + self.mlp(x)).mean(1)

    groups, smaller = cut(Block(), TOKENS)
    assert groups["mlp.1"].is_prunable
    assert smaller.mlp[1].out_features == 24
    assert smaller.attention.embed_dim == 24


def test_a_constant_in_the_code_protects_channels_and_names_the_line():
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nets.conv_bn(3, 8), nets.conv_bn(6, 6), nets.Head(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x)[:, :6]))

    groups, _ = cut(Constant(), IMAGES)
    reasons = {group.reason for group in groups.values() if group.name.startswith("a.0")}
    assert any("the code depends on their number" in reason and "test_trial_search.py" in reason for reason in reasons)
    assert groups["b.0"].is_prunable


def test_an_attribute_that_equals_a_width_by_chance_stays():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = StoredSplit((6, 4)), StoredSplit((4, 6))
            self.limit = 6  # equals a width, but is none

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) + self.right(x) * self.limit

    _, smaller = cut(Two(), IMAGES)
    assert (smaller.left.sizes, smaller.right.sizes, smaller.limit) == ([3, 2], [2, 3], 6)


def test_norms_over_channels_are_cut_with_the_statistics_of_the_remaining_channels():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.few, self.many = nn.Conv2d(3, 12, 3), nn.GroupNorm(2, 12), nn.GroupNorm(6, 12)
            self.b, self.c = nn.Conv2d(12, 12, 3), nn.Conv2d(12, 8, 3)
            self.last, self.rms, self.out = nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.few(self.a(x)).relu()
            x = self.c(self.many(self.b(x)).relu()).permute(0, 2, 3, 1)
            return self.out(self.rms(self.last(x))).mean((1, 2))

    groups, smaller = cut(Normed(), IMAGES)
    assert all(group.is_prunable for name, group in groups.items() if name != "out")
    assert (smaller.few.num_groups, smaller.few.num_channels) == (2, 6)
    assert (smaller.many.num_groups, smaller.many.num_channels) == (3, 6)
    assert smaller.last.normalized_shape == smaller.rms.normalized_shape == (4,)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(16), nn.BatchNorm2d(16, affine=False, track_running_stats=False)])
def test_a_norm_without_tensors_states_its_new_width(norm: nn.Module):
    """Torch compares it with the width of the input, and warns; warnings are errors in these tests."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(8, 5))
    groups, smaller = cut(net, IMAGES)
    assert groups["0"].is_prunable
    assert smaller.get_submodule("1").num_features == 8
    assert norm.num_features == 16
