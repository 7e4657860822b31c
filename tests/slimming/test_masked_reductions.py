"""Statistics over channels: the masked network takes them of the channels that exist, as the slim one does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy import Plan, find_groups, masked, slim, verify
from passdeploy.channels.groups import ChannelGroup
from passdeploy.errors import ModelError
from passdeploy.slimming.masked_reductions import KeptAlong

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Statistic(nn.Module):
    """Whatever is done with channels, in a module of its own and called twice."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x)


class Net(nn.Module):
    """Two convolutions, after each of which a statistic goes over its channels."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 5)
        self.statistic = Statistic(how)

    def forward(self, x: Tensor) -> Tensor:
        x = self.statistic(self.first(x).sigmoid())  # a channel without weights would still count as a half
        x = self.statistic(self.second(x).sigmoid() - 0.7)
        return self.head(x.mean((2, 3)))


def response_norm(x: Tensor) -> Tensor:
    """ConvNeXt V2's global response norm."""
    strength = x.norm(dim=(2, 3), keepdim=True)
    return x + x * strength / (strength.mean(dim=1, keepdim=True) + 1e-6)


RESTRICTED = {
    "response norm": response_norm,
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "torch.mean": lambda x: x * torch.mean(x, dim=(1, 2), keepdim=True),
    "sum": lambda x: x / x.sum(1, keepdim=True),
    "softmax": lambda x: x.softmax(1) * 3,
    "F.softmax": lambda x: F.softmax(x, dim=-3) + x,
    "amax": lambda x: x - x.amax(1, keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=1),
    "norm": lambda x: x / x.norm(dim=1, keepdim=True),
    "max": lambda x: x - x.max(1, keepdim=True)[0],
    "attention by maximum and mean": lambda x: (
        x * torch.stack([torch.max(x, dim=1).values, x.mean(1)], 1).sum(1, keepdim=True).sigmoid()
    ),
    "min": lambda x: x - x.min(dim=1, keepdim=True).values + x.amin(1, keepdim=True).square(),
    "variance": lambda x: x / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt(),
    "variance and mean": lambda x: x - torch.var_mean(x, 1, correction=0, keepdim=True)[1],
    "deviation": lambda x: x - torch.std(x, 1, unbiased=False, keepdim=True),
    "logsumexp": lambda x: x - x.logsumexp(1, keepdim=True),
    "channel attention": lambda x: (
        (F.normalize(x.flatten(2), dim=-1) @ F.normalize(x.flatten(2), dim=-1).mT).softmax(-1) @ x.flatten(2)
    ).view_as(x),
}


PLAN = Plan({"first": (0, 3, 4, 6, 7), "second": (1, 2, 5, 8, 11)})


def network_with_groups(statistic: Callable[[Tensor], Tensor]) -> tuple[nn.Module, tuple[ChannelGroup, ...]]:
    """Build a network that computes a statistic over channels, whose first two groups can be cut."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net(statistic).eval()
    groups = find_groups(net, IMAGES)
    assert [group.is_prunable for group in groups] == [True, True, False]
    return net, groups


@pytest.mark.parametrize("name", RESTRICTED)
def test_a_statistic_goes_over_the_channels_that_exist(name: str):
    net, groups = network_with_groups(RESTRICTED[name])
    assert verify(net, groups, PLAN, IMAGES, tolerance=1e-5) <= 1e-5
    # The masked network does not merely drop what is gone: its statistics are others.
    reference, plain = masked(net, groups, PLAN), masked(net, groups, PLAN)
    plain._forward_pre_hooks.clear()
    plain._forward_hooks.clear()
    assert not torch.allclose(reference(IMAGES), plain(IMAGES), atol=1e-5)


def pixels_first(x: Tensor) -> Tensor:
    """All channels of a pixel, then those of the next one."""
    return x.movedim(1, -1).flatten(1)


FLATTENED = {
    "a minimum": lambda x: x - x.flatten(1).min(1).values[:, None, None, None],
    "a mean": lambda x: x - x.flatten(1).mean(1)[:, None, None, None],
    "a norm of pixels with their channels": lambda x: x / pixels_first(x).norm(dim=1)[:, None, None, None],
}


@pytest.mark.parametrize("name", FLATTENED)
def test_channels_and_positions_in_one_dimension_at_any_image_size(name: str):
    net, groups = network_with_groups(FLATTENED[name])
    reference, smaller = masked(net, groups, PLAN), slim(net, groups, PLAN)
    with torch.no_grad():
        for height, width in ((8, 8), (7, 9), (16, 16), (9, 16)):
            images = torch.randn(3, 3, height, width)
            torch.testing.assert_close(reference(images), smaller(images))


def test_places_of_channels_at_another_size():
    def kept(*owners: int) -> KeptAlong:
        numbers = torch.tensor(owners)
        return KeptAlong(-1, numbers != 1, numbers)

    assert kept(0, 0, 1, 1).at(6).tolist() == [True, True, True, False, False, False]
    assert kept(0, 1, 0, 1).at(6).tolist() == [True, False, True, False, True, False]
    for unclear in (kept(0, 0, 1, 1, 0, 0, 1, 1), kept(0, 1, 2), kept(0, 0, 1, 1)):
        with pytest.raises(ModelError, match="cannot be told"):
            unclear.at(9)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda x: x - x.var(1, keepdim=True), "an unbiased variance"),
        (lambda x: x - torch.std_mean(x, 1, keepdim=True)[0], "an unbiased variance"),
        (lambda x: x.cumsum(1), "a statistic over these channels depends"),
        (lambda x: x + x.max(1, keepdim=True)[1], "the place of a maximum"),
        (lambda x: x + x.argmax(1, keepdim=True), "a statistic over these channels depends"),
    ],
    ids=["var", "std_mean", "cumsum", "place of maximum", "argmax"],
)
def test_other_statistics_protect(how: Callable[[Tensor], Tensor], reason: str):
    net = Net(how).eval()
    groups = find_groups(net, IMAGES)
    assert not any(group.is_prunable for group in groups)
    assert all(reason in group.reason for group in groups[:2])


def test_a_masked_network_learns_through_its_statistics():
    net = Net(response_norm).eval()
    groups = find_groups(net, IMAGES)
    plan = Plan({"first": (0, 1), "second": (2, 3, 4)})
    reference, smaller = masked(net, groups, plan), slim(net, groups, plan)
    reference(IMAGES).square().sum().backward()
    smaller(IMAGES).square().sum().backward()
    assert torch.allclose(reference.second.weight.grad[2:5, :2], smaller.second.weight.grad, atol=1e-5)
