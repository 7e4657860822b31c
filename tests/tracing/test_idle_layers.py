"""Layers that the example does not reach may get the channels of those that it does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import passdeploy as pd
from passdeploy.commands.describe import describe
from passdeploy.grouping.find import map_channels

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Images are sent to one of two layers, by their brightness or by their number."""

    def __init__(self, *, by_brightness: bool, last: nn.Module) -> None:
        super().__init__()
        self.by_brightness, self.stem, self.head = by_brightness, nn.Conv2d(3, 8, 3), nn.Linear(6, 5)
        self.experts = nn.ModuleList([nn.Conv2d(8, 6, 3), last])

    def forward(self, x: Tensor) -> Tensor:
        is_first = float(x.abs().max()) < 5 if self.by_brightness else len(x) < 9
        return self.head(self.experts[0 if is_first else 1](self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("by_brightness", [False, True])
def test_channels_that_an_idle_layer_may_get_stay(by_brightness: bool):
    groups = pd.find_groups(Experts(by_brightness=by_brightness, last=nn.Conv2d(8, 6, 3)).eval(), IMAGES)
    assert not any(group.is_prunable for group in groups)
    assert groups[0].reason == "experts.1, which did not run, may run in its place"


def test_an_idle_layer_of_another_shape_protects_nothing():
    groups = pd.find_groups(Experts(by_brightness=False, last=nn.Conv2d(8, 6, 1)).eval(), IMAGES)
    assert [group.name for group in groups if group.is_prunable] == ["stem", "experts.0"]


class LargeImages(nn.Module):
    """A network with a layer for large images, one that nothing calls, and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.small, self.large = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(8, 6, 5)
        self.head, self.forgotten, self.tied = nn.Linear(6, 5), nn.Linear(6, 2), nn.Linear(6, 5)
        self.tied.weight, self.tied.bias = self.head.weight, self.head.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((self.large if x.shape[-1] > 20 else self.small)(x).mean((2, 3)))


def test_layers_that_did_not_run_are_named():
    channels = map_channels(LargeImages().eval(), IMAGES)
    assert channels.idle_layers == ("large", "forgotten")
    document = describe(channels, round_to=1)
    assert document["idle_layers"] == ["large", "forgotten"]
    assert any("did not run" in line and "large, forgotten" in line for line in document["words"])


def test_a_network_whose_layers_all_ran_has_no_such_line():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).eval()
    assert not any("did not run" in line for line in describe(map_channels(net, IMAGES), round_to=1)["words"])
