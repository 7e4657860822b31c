"""Convolutions of every kind between two others: what can be cut, exactly, and how many multiply-adds are left."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import passdeploy as pd
from passdeploy.grouping.find import map_channels

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def chain(layer: nn.Module, inputs: int = 8, outputs: int = 8) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, inputs, 3, padding=1), nn.ReLU(), layer, nn.Conv2d(outputs, 5, 1), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten()).double().eval()


def counted(network: nn.Module) -> float:
    """Multiply-adds of all images, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(IMAGES)
    return counter.get_total_flops() / 2


LAYERS: dict[str, tuple[nn.Module, dict[str, int]]] = {  # -> widths of the groups
    "plain": (nn.Conv2d(8, 6, 3), {"0": 8, "2": 6}),
    "in two groups": (nn.Conv2d(8, 6, 3, groups=2), {"0": 4, "2": 3}),
    "in four groups of two": (nn.Conv2d(8, 12, 3, groups=4), {"0": 4}),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), {"0": 8}),
    "depthwise with two outputs each": (nn.Conv2d(8, 16, 3, groups=8, bias=False), {"0": 8}),
    "transposed": (nn.ConvTranspose2d(8, 6, 2, stride=2), {"0": 8, "2": 6}),
    "transposed in two groups": (nn.ConvTranspose2d(8, 6, 2, groups=2), {"0": 4, "2": 3}),
    "transposed in four groups of two": (nn.ConvTranspose2d(8, 12, 2, groups=4), {"0": 4}),
    "transposed depthwise": (nn.ConvTranspose2d(8, 8, 2, groups=8), {"0": 8}),
    "transposed depthwise with two outputs each": (nn.ConvTranspose2d(8, 16, 2, groups=8), {"0": 8}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_convolution_is_cut_exactly_and_its_multiply_adds_are_those_that_torch_counts(name: str):
    layer, widths = LAYERS[name]
    network = chain(layer, outputs=layer.out_channels)
    channels = map_channels(network, IMAGES)
    assert {group.name: group.width for group in channels.prunable} == widths
    assert channels.costs.of("macs") == counted(network)
    for kept in (range(1, 8, 2), range(2)):
        plan = pd.Plan({group: tuple(index for index in kept if index < width) for group, width in widths.items()})
        assert pd.verify(network, channels.groups, plan, IMAGES, tolerance=1e-12) <= 1e-12
        smaller = pd.slim(network, channels.groups, plan)
        assert channels.costs.of("macs", plan.widths()) == counted(smaller)
        assert channels.costs.of("params", plan.widths()) == sum(one.numel() for one in smaller.parameters())


class Fixed(nn.Module):
    """A convolution with a weight or a bias that is computed, in as many groups."""

    def __init__(self, groups: int = 1, *, bias: bool = False) -> None:
        super().__init__()
        self.groups, self.weight = groups, nn.Parameter(torch.randn(8, 8, 3, 3)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return F.conv2d(x, self.weight, torch.ones(8, dtype=x.dtype))
        return F.conv2d(x, torch.ones(8, 8 // self.groups, 3, 3, dtype=x.dtype), groups=self.groups)


class Blur(nn.Module):
    """A depthwise convolution with one kernel, repeated for as many channels as there are; or with one for each."""

    def __init__(self, *, is_same: bool = True, transposed: bool = False) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.randn(1, 1, 3, 3))
        self.is_same, self.convolve = is_same, F.conv_transpose2d if transposed else F.conv2d

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernels = self.kernel.expand(channels, -1, -1, -1) if self.is_same else self.kernel.repeat(channels, 1, 1, 1)
        if not self.is_same:
            kernels = kernels * torch.arange(channels, dtype=x.dtype)[:, None, None, None]
        return self.convolve(x, kernels, groups=channels)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_kernel_that_is_repeated_for_every_channel_is_cut_along(transposed: bool):
    network = chain(Blur(transposed=transposed))
    channels = map_channels(network, IMAGES)
    assert {group.name: group.width for group in channels.prunable} == {"0": 8}
    assert channels.costs.of("macs") == counted(network)
    plan = pd.Plan({"0": (1, 6, 7)})
    assert pd.verify(network, channels.groups, plan, IMAGES, tolerance=1e-12) <= 1e-12
    assert channels.costs.of("macs", plan.widths()) == counted(pd.slim(network, channels.groups, plan))


def test_kernels_of_which_each_is_another_keep_their_channels():
    groups = {group.name: group for group in pd.find_groups(chain(Blur(is_same=False)), IMAGES)}
    assert "the function changes" in groups["0"].reason


@pytest.mark.parametrize(
    ("layer", "group", "words"),
    [
        (Fixed(), "0", "meets a weight that cannot be cut"),
        (Fixed(8), "0", "the code depends on their number"),
        (Fixed(2), "0", "meets a weight that cannot be cut"),
        (Fixed(bias=True), "2", "meets a fixed bias"),
    ],
    ids=["weight", "depthwise", "two groups", "bias"],
)
def test_what_meets_computed_weights_stays(layer: nn.Module, group: str, words: str):
    found = {one.name: one for one in pd.find_groups(chain(layer), IMAGES)}
    assert words in found[group].reason


def test_the_channels_of_a_depthwise_convolution_of_an_image_stay():
    network = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 5, 1)).double().eval()
    assert "reads an input that cannot be cut" in pd.find_groups(network, IMAGES)[0].reason


def test_a_convolution_of_a_single_image_without_a_batch():
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x[0]).relu()).mean((1, 2)))[None]

    network = Single().double().eval()
    groups = pd.find_groups(network, IMAGES[:1])
    assert {group.name: group.width for group in groups if group.is_prunable} == {"first": 8, "second": 6}
    plan = pd.Plan({"first": (1, 2), "second": (0, 5)})
    assert pd.verify(network, groups, plan, IMAGES[:1], tolerance=1e-12) <= 1e-12
