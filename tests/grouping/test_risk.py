"""Checks that networks require before they may be cut, and errors that these checks find."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model

from passdeploy import Plan, find_groups, masked, slim, verify
from passdeploy.grouping.comparison import randomised
from passdeploy.grouping.risk import RequiredCheck, keeps_order, required_check
from passdeploy.tracing.trace_channels import trace_channels
from tests import nets

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def check_of(net: nn.Module, images: Tensor = IMAGES) -> RequiredCheck:
    return required_check(trace_channels(net.eval(), images), lambda name: type(net.get_submodule(name)))


def cut_in_half(net: nn.Module) -> float:
    """Keep half of every group and return the error of the slim network; fails if nothing can be cut."""
    groups = find_groups(net.eval(), IMAGES)
    plan = Plan({group.name: tuple(range(group.width // 2)) for group in groups if group.is_prunable})
    assert plan.kept
    slim(net, groups, plan).train()(IMAGES)
    return verify(net, groups, plan, IMAGES, tolerance=1e-5)


@pytest.mark.parametrize("name", ["alexnet", "vgg11_bn", "resnet18", "mobilenet_v2", "densenet121", "convnext_tiny"])
def test_networks_that_state_no_sizes_require_no_check(name: str):
    assert check_of(get_model(name, weights=None), torch.randn(1, 3, 64, 64)) is RequiredCheck.NONE


class Restating(nn.Module):
    """A network that gives a view its number of channels, which stays the same."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.conv, self.head = nn.Conv2d(3, self.width, 1), nets.Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(x.size(0), self.width, 4, -1))


class LayerScale(nn.Module):
    """A network that scales channels by a vector, which a view gives dimensions of size one on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.gamma = nn.Conv2d(3, 6, 1), nets.Head(6), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x) * self.gamma.reshape(1, -1, 1, 1))


def test_ones_around_channels_require_sizes_alone():
    assert check_of(LayerScale()) is RequiredCheck.SIZES
    assert cut_in_half(LayerScale()) <= 1e-5


@pytest.mark.parametrize(
    ("shape", "dim", "new_shape", "new_dim", "keeps"),
    [
        ((6,), 0, (1, 6, 1, 1), 1, True),
        ((1, 6), 1, (1, 1, 6, 1), 2, True),
        ((2, 6, 4, 4), 1, (2, 6, 16), 1, True),
        ((2, 3, 6, 4), 2, (6, 6, 4), 1, True),  # what is behind the channels is as before
        ((1, 6, 4), 1, (6, 1, 4), 0, False),
        ((1, 6, 4), 1, (6, 4, 1), 0, False),  # the batch has moved behind the channels
        ((1, 6, 2, 2), 1, (6, 4), 0, False),
    ],
)
def test_a_view_keeps_the_order_of_channels(
    shape: tuple[int, ...], dim: int, new_shape: tuple[int, ...], new_dim: int, keeps: bool
):
    assert keeps_order(shape, dim, new_shape, new_dim) is keeps


class HandMadeDepthwise(nn.Module):
    """A functional depthwise convolution whose number of groups is an attribute of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 6
        self.conv, self.head = nn.Conv2d(3, self.dim, 1), nets.Head(6)
        self.filters = nn.Parameter(torch.randn(self.dim, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d(self.conv(x), self.filters, padding=1, groups=self.dim))


class HandMadeNorm(nn.Module):
    """A functional layer norm whose shape is an attribute of the module, over channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = (6,)
        self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)
        self.weight, self.bias = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.layer_norm(self.conv(x).permute(0, 2, 3, 1), self.shape, self.weight, self.bias))


@pytest.mark.parametrize("kind", [Restating, HandMadeDepthwise, HandMadeNorm])
def test_size_attributes_of_a_module_are_tried_and_follow(kind: type[nn.Module]):
    net = kind()
    assert check_of(net) is RequiredCheck.SIZES
    assert cut_in_half(net) < 1e-5


class Faded(nn.Module):
    """A network that multiplies by a number of channels, hidden by a tiny scale, such as an untrained layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nets.Head(8)
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1e-8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        inner = self.inner(x)
        return self.head(x + self.scale * inner * torch.tensor(float(inner.size(1))))


def test_an_error_that_the_weights_hide_is_found():
    net = Faded()
    assert check_of(net) is RequiredCheck.VALUES
    groups = find_groups(net, IMAGES)
    assert [group.is_prunable for group in groups[:2]] == [False, False]
    plain = Plan({})
    assert torch.equal(masked(net, groups, plain)(IMAGES), net(IMAGES))


def test_randomised_weights_vary_and_the_others_are_shared():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    nn.init.zeros_(net[2].weight)
    state = dict(net.named_parameters())
    other = randomised(state)
    assert other["0.weight"] is net[0].weight
    for name, before in state.items():
        assert other[name].std() > 0
        assert (other[name] is before) == (before.std() > 0)
    assert (net[2].weight == 0).all()
    assert (net[1].weight == 1).all()


class CountingPixels(nn.Module):
    """A network that divides by a number of pixels, which depends on values, and by a width if asked."""

    def __init__(self, *, counts_channels: bool) -> None:
        super().__init__()
        self.counts_channels = counts_channels
        self.first, self.inner, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nets.Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        pixels = torch.nonzero(x.sum(1) > 0).size(0) + 100  # larger than any width
        x = self.inner(x / (x.size(1) if self.counts_channels else 1))
        return self.head(x) / pixels


@pytest.mark.parametrize("counts_channels", [False, True])
def test_a_scalar_may_depend_on_values_but_not_on_widths(counts_channels: bool):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = CountingPixels(counts_channels=counts_channels).eval()
    assert not trace_channels(net, IMAGES).is_meta
    groups = find_groups(net, IMAGES)
    assert [group.is_prunable for group in groups[:2]] == [not counts_channels, True]


def test_a_division_by_a_parameter_that_a_mask_sets_to_zero_protects():
    """As in learned quantisation, where every channel is divided by a step of its own."""

    class Stepping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.step = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.Parameter(torch.ones(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x) / self.step)

    net = Stepping().eval()
    assert check_of(net) is RequiredCheck.VALUES
    assert not any(group.is_prunable for group in find_groups(net, IMAGES))
