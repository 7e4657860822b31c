"""Tests of labels under views: labels move with the channels, for random shapes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import passdeploy as pd
from passdeploy.tracing.rules.movement import _view_labels


@st.composite
def views(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Draw a shape and another with as many elements, made by dividing and merging neighbouring dimensions."""
    old = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=5))
    factors: list[int] = []
    for size in old:
        parts = draw(
            st.sampled_from([(size,), (1, size), (size, 1), *((d, size // d) for d in (2, 3) if size % d == 0)])
        )
        factors += parts
    new: list[int] = []
    for factor in factors:
        if new and draw(st.booleans()):
            new[-1] *= factor
        else:
            new.append(factor)
    return old, new


@settings(deadline=None)
@given(views(), st.data())
def test_a_view_takes_labels_where_it_takes_channels(shapes: tuple[list[int], list[int]], data: st.DataObject):
    old, new = shapes
    dim = data.draw(st.integers(0, len(old) - 1))
    vector = torch.arange(1, old[dim] + 1)
    everywhere = vector.view([-1 if d == dim else 1 for d in range(len(old))]).expand(old)
    assert torch.equal(_view_labels(vector, dim, old, new), everywhere.reshape(new))


def test_dimensions_that_a_view_does_not_merge_take_no_memory():
    rows = _view_labels(torch.arange(512), 1, (2048, 512, 3, 3), (1, 2048, 512 * 9))
    assert rows.shape == (1, 2048, 512 * 9)
    assert rows.untyped_storage().nbytes() <= 8 * math.prod((512, 9))


class Strided(nn.Module):
    """Every other channel goes through a branch.

    Args:
        start: of the slice.
        protects: let the channels of the branch stay.
    """

    def __init__(self, start: int, *, protects: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.branch, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(4 - start // 2, 6, 1), nn.Linear(10, 5)
        self.start, self.protects = start, protects

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        even, odd = x[:, self.start :: 2], x[:, 1::2]
        even = even.cumsum(1) if self.protects else even
        return self.head(torch.cat([self.branch(even), odd], 1).mean((2, 3)))


@pytest.mark.parametrize(
    ("start", "protects", "width"), [(0, False, 4), (1, False, 4), (0, True, 0), (2, False, 0)], ids=str
)
def test_a_strided_slice_picks_the_same_channels_after_any_cut(start: int, protects: bool, width: int):
    network, images = Strided(start, protects=protects).eval(), torch.randn(2, 3, 6, 6)
    groups = pd.find_groups(network, images)
    assert sum(group.width for group in groups if group.name.startswith("stem") and group.is_prunable) == width
    for channel in range(4):
        plan = pd.Plan({group.name: (channel,) for group in groups if group.is_prunable})
        assert pd.verify(network, groups, plan, images, tolerance=1e-5) <= 1e-5


class Picking(nn.Module):
    """A 1x1 convolution reads what `pick` takes of the channels of `stem`; a layer's name decides how trials cut it."""

    def __init__(self, pick: Callable[[Tensor], Tensor], *, channels: int, picked: int, name: str = "stem") -> None:
        super().__init__()
        self.pick, self.name = pick, name
        self.add_module(name, nn.Conv2d(3, channels, 3))
        self.head = nn.Conv2d(picked, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pick(self.get_submodule(self.name)(x)))


@pytest.mark.parametrize(
    ("pick", "removable"),
    [
        (lambda y: y[:, 2:3], 0),  # by a size that the code states
        (lambda y: y[:, 2].unsqueeze(1), 5),  # those before it keep its place
        (lambda y: y[:, -2].unsqueeze(1), 6),
        (lambda y: y[:, y.shape[1] // 4].unsqueeze(1), 0),  # another place in a narrower network
    ],
)
@pytest.mark.parametrize("name", ["a", "q", "stem"])
def test_a_channel_that_is_picked_by_its_place_is_the_same_one_after_any_cut(
    pick: Callable[[Tensor], Tensor], removable: int, name: str
):
    net, images = Picking(pick, channels=8, picked=1, name=name).eval(), torch.randn(2, 3, 10, 12)
    groups = pd.find_groups(net, images)
    assert sum(group.width for group in groups if group.is_prunable) == removable
    for seed in range(4 if removable else 0):
        keep = torch.randperm(removable, generator=torch.Generator().manual_seed(seed))[:2].sort().values.tolist()
        plan = pd.Plan({group.name: keep for group in groups if group.is_prunable})
        pd.verify(net, groups, plan, images, tolerance=1e-5)


@pytest.mark.parametrize("channels", [4, 8, 12])
@pytest.mark.parametrize(
    "roll", [lambda y: y.roll(2, 1), lambda y: y.roll(-1, 1), lambda y: y.roll(y.shape[1] // 2, 1)]
)
def test_channels_that_are_rolled_along_themselves_stay(roll: Callable[[Tensor], Tensor], channels: int):
    net = Picking(roll, channels=channels, picked=channels).eval()
    assert not any(group.is_prunable for group in pd.find_groups(net, torch.randn(2, 3, 10, 12)))


def test_channels_are_cut_where_positions_are_rolled():
    net = Picking(lambda y: y.roll((2, -1), (2, 3)), channels=8, picked=8).eval()
    assert any(group.is_prunable for group in pd.find_groups(net, torch.randn(2, 3, 10, 12)))


def test_a_channel_shuffle_is_followed_through_its_groups():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ChannelShuffle(2), nn.Conv2d(16, 5, 3)).eval()
    images = torch.randn(2, 3, 12, 12)
    groups = pd.find_groups(net, images)
    assert [(group.name, group.width, group.is_prunable) for group in groups[:1]] == [("0", 8, True)]
    plan = pd.Plan({"0": (1, 2, 6)})
    assert pd.verify(net, groups, plan, images, tolerance=1e-5) <= 1e-5
    assert pd.slim(net, groups, plan)[0].out_channels == 6


class Warp(nn.Module):
    """Features that are sampled where a predicted flow points to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.flow = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.flow(x).tanh().permute(0, 2, 3, 1)
        return self.head(nn.functional.grid_sample(self.stem(x), grid, align_corners=False))


def test_predicted_coordinates_stay_and_what_they_sample_can_be_cut():
    groups = {group.name: group for group in pd.find_groups(Warp().eval(), torch.randn(2, 3, 12, 12))}
    assert groups["stem"].is_prunable
    assert "coordinates" in groups["flow"].reason


class Counting(nn.Module):
    """A network that counts its calls, in a buffer and in an attribute, and branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.classify = nn.Conv2d(3, 16, 3), nn.Linear(16, 5)
        self.register_buffer("count", torch.zeros(1))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.calls += 1
        x = self.stem(x)
        return self.classify((x.relu() if x.abs().sum() > 0 else x).mean((2, 3)))


def test_a_network_that_needs_values_is_left_as_it_was():
    net, images = Counting().eval(), torch.randn(2, 3, 12, 12)
    assert pd.find_groups(net, images)[0].is_prunable
    pd.count(net, images)
    assert (net.count.item(), net.calls) == (0, 0)
