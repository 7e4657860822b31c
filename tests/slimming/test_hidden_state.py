"""Buffers that are cut and are in no state dict."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import passdeploy as pd
from passdeploy.slimming.slim import hidden_state

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """A layer whose channels are scaled by a buffer that is not saved, beside one that is no channel's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.register_buffer("scale", torch.linspace(0.5, 2, 8).view(8, 1, 1), persistent=False)
        self.register_buffer("offset", torch.ones(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.stem(x).relu() * self.scale).mean((2, 3))) + self.offset


def test_what_a_rebuild_needs_beside_the_state_dict_is_what_was_cut():
    network = Scaled().eval()
    groups = pd.find_groups(network, IMAGES)
    smaller = pd.slim(network, groups, pd.Plan({"stem": (1, 4, 6)}))
    (name,) = state = hidden_state(smaller, groups)
    assert name == "scale"
    assert torch.equal(state["scale"], network.scale[[1, 4, 6]])
