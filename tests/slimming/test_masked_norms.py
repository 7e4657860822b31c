"""Norms and standardised weights: the masked network takes their statistics of the channels that stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy import find_groups, masked, verify
from passdeploy.grouping.trial_cut import random_plan
from passdeploy.slimming.masked_norms import KeptMask, RestrictedNorms, group_norm, layer_norm, rms_norm, standardise

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


class FixedLayerNorm(nn.Module):
    """A layer norm whose scale and shift are buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.register_buffer("weight", torch.rand(width, generator=draw) + 0.5)
        self.register_buffer("bias", torch.randn(width, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6)


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
    "layer norm of fixed scale": (
        lambda: drawn(nn.Linear(6, 12), nn.Sigmoid(), FixedLayerNorm(12), nn.Linear(12, 5)),
        TOKENS,
    ),
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


# The restricted norms themselves: what torch computes of the part that is kept, and zero elsewhere

KEPT = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
SCALE, SHIFT = torch.linspace(0.5, 2, 6), torch.linspace(-1, 1, 6)


def is_zero_elsewhere(found: Tensor, dim: int) -> bool:
    return not found.index_select(dim, (KEPT == 0).nonzero()[:, 0]).any()


@pytest.mark.parametrize("shift", [None, SHIFT], ids=["scale", "scale and shift"])
def test_a_restricted_layer_norm(shift: Tensor | None):
    at = KEPT.bool()
    found = layer_norm(TOKENS, KEPT, SCALE, shift, 0.1)
    expected = F.layer_norm(TOKENS[..., at], (4,), SCALE[at], None if shift is None else shift[at], 0.1)
    torch.testing.assert_close(found[..., at], expected)
    assert is_zero_elsewhere(found, -1)


def test_a_restricted_layer_norm_over_two_dimensions():
    at, scale = KEPT.bool(), torch.outer(torch.linspace(1, 3, 9), SCALE)
    found = layer_norm(TOKENS, KEPT.expand(9, 6), scale, scale, 0.1)
    expected = F.layer_norm(TOKENS[..., at], (9, 4), scale[:, at], scale[:, at], 0.1)
    torch.testing.assert_close(found[..., at], expected)
    assert is_zero_elsewhere(found, -1)


@pytest.mark.parametrize("eps", [None, 0.1])
def test_a_restricted_rms_norm(eps: float | None):
    at, small = KEPT.bool(), 1e-3 * TOKENS  # of which the smallest number of the type is a part
    found = rms_norm(small, KEPT, SCALE, eps)
    torch.testing.assert_close(found[..., at], F.rms_norm(small[..., at], (4,), SCALE[at], eps))
    assert is_zero_elsewhere(found, -1)


@pytest.mark.parametrize("shift", [None, SHIFT], ids=["scale", "scale and shift"])
@pytest.mark.parametrize("ndim", [3, 4])
def test_a_restricted_group_norm_whose_groups_keep_different_numbers_of_channels(shift: Tensor | None, ndim: int):
    at, x = KEPT.bool(), torch.randn(2, 6, *[5, 4][: ndim - 2], generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    found = group_norm(x, 2, kept, SCALE, shift, 0.1)
    for at in ([0, 2], [3, 4, 5]):  # the groups
        expected = F.group_norm(x[:, at], 1, SCALE[at], None if shift is None else shift[at], 0.1)
        torch.testing.assert_close(found[:, at], expected)
    assert not found[:, 1].any()


def test_a_restricted_group_norm_of_which_a_group_is_gone():
    kept = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    found = group_norm(IMAGES.repeat(1, 2, 1, 1), 2, kept, SCALE, SHIFT, 0.1)
    assert not found[:, :3].any()
    torch.testing.assert_close(found[:, 3:], F.group_norm(IMAGES, 1, SCALE[3:], SHIFT[3:], 0.1))


@pytest.mark.parametrize("shift", [None, SHIFT], ids=["scale", "scale and shift"])
@pytest.mark.parametrize("scale", [None, SCALE], ids=["plain", "scaled"])
def test_standardised_weights_of_which_parts_are_gone(scale: Tensor | None, shift: Tensor | None):
    rows = TOKENS.movedim(2, 1)[:1]  # (1, outputs, weights of one)
    kept = torch.ones(1, 6, 9)
    kept[:, :, 2:5], kept[:, 1] = 0.0, 0.0
    found = standardise(rows, kept, scale, shift, 0.1)
    left = rows[..., [0, 1, 5, 6, 7, 8]]
    expected = F.batch_norm(left, None, None, scale, shift, training=True, eps=0.1)
    outputs = [0, 2, 3, 4, 5]
    torch.testing.assert_close(found[..., [0, 1, 5, 6, 7, 8]][:, outputs], expected[:, outputs])
    assert not found[:, 1].any()
    assert not found[..., 2:5].any()


def test_a_weight_of_which_one_number_is_left_is_its_own_mean():
    kept = torch.zeros(1, 2, 4)
    kept[:, :, 1] = 1.0
    assert not standardise(torch.ones(1, 2, 4), kept, None, None, 0.1).any()


def test_a_mode_knows_whether_it_restricted_anything():
    scale, other = nn.Parameter(SCALE), nn.Parameter(SCALE)
    mode = RestrictedNorms([(scale, KEPT)])
    assert not mode.was_used
    with mode:
        F.layer_norm(TOKENS, (6,), other)
    assert not mode.was_used
    with mode:
        F.layer_norm(TOKENS, (6,), scale)
    assert mode.was_used


def test_a_mask_is_zero_in_every_slice_that_was_removed():
    mask = KeptMask(torch.Size((3, 4)), {0: torch.tensor([1]), 1: torch.tensor([0, 3])})
    found = mask.to(torch.zeros(1, dtype=torch.float64))
    assert found.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]]
    assert found.dtype == torch.float64


class Called(nn.Module):
    """Norms that are called as functions, with every argument named or none, and as a module without a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 5, 1)
        self.weights = nn.ParameterList(torch.linspace(1, 2, 12) for _ in range(6))
        self.bias = nn.Parameter(torch.linspace(-1, 1, 12))

    def forward(self, x: Tensor) -> Tensor:
        x, (a, b, c, d, e, f) = self.stem(x).sigmoid(), self.weights
        x = F.group_norm(x, num_groups=2, weight=a, bias=self.bias, eps=0.2)
        x = torch.group_norm(x, 2, b, None, 0.1)
        x = F.group_norm(x, 1, c).movedim(1, -1)
        x = F.layer_norm(x, normalized_shape=x.shape[-1:], weight=d, eps=0.2)
        x = torch.layer_norm(x, x.shape[-1:], e)
        return self.head(F.rms_norm(input=x, normalized_shape=x.shape[-1:], weight=f, eps=0.1).movedim(-1, 1))


def test_norms_are_restricted_however_they_are_called():
    net = Called().double().eval()
    images = IMAGES.double()
    groups = find_groups(net, images)
    (stem,) = [group for group in groups if group.is_prunable]
    for seed in range(2):
        assert verify(net, groups, random_plan(groups, seed), images, tolerance=1e-12) <= 1e-12
    assert stem.name == "stem"
