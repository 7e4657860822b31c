"""Shares of a saving: they add up to the whole, and a layer's saving is shared by its input and output channels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from passdeploy.channels.plan import Plan
from passdeploy.channels.savings import savings_by_part
from passdeploy.grouping.find import map_channels


def test_savings_add_up_to_what_was_saved():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
    costs = map_channels(network, torch.zeros(1, 3, 4, 4)).costs
    plan = Plan({"0": (0, 1, 2, 3), "1": (0, 1, 2, 3)})
    saved = savings_by_part(costs, "macs", plan.widths())
    assert sum(saved.values()) == pytest.approx(1 - costs.of("macs", plan.widths()) / costs.of("macs"))
    # half of 3 x 8, and half of what 8 x 8 -> 4 x 4 saves; half of 8 x 4, and the other half
    assert saved["0"] * (24 + 64 + 32) == pytest.approx(12 + 24)
    assert saved["1"] * (24 + 64 + 32) == pytest.approx(16 + 24)
    assert savings_by_part(costs, "macs", Plan({"0": tuple(range(8))}).widths()) == {"0": 0.0}
