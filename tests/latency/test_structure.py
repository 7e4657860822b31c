from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from passdeploy.channels.groups import ChannelMap
from passdeploy.errors import PlanError
from passdeploy.grouping.find import map_channels
from passdeploy.latency.latency_cost import with_latency
from passdeploy.latency.structure import hash_modules, hash_operators, require_same_network
from passdeploy.latency.table import LatencyTable

from .fakes import FakeSampler, table_of

IMAGE = torch.zeros(1, 3, 8, 8)


def network(
    widths: tuple[int, int, int] = (64, 96, 48),
    *,
    activation: Callable[[], nn.Module] = nn.ReLU,
    kernel: int = 3,
    classes: int = 10,
) -> nn.Sequential:
    """Build the chain of convolutions of the fake sampler; groups '0', '2', '4'."""
    layers: list[nn.Module] = []
    for before, width in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, width, kernel, padding=kernel // 2), activation()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)).eval()


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    """Make a table of the network as it is by default."""
    made = table_of(FakeSampler(), map_channels(network(), IMAGE))
    return replace(made, modules=hash_modules(network(), IMAGE))


def mapped(model: nn.Module) -> tuple[nn.Module, ChannelMap, Tensor]:
    return model, map_channels(model, IMAGE), IMAGE


class Functional(nn.Module):
    """A network whose operators without weights are no modules."""

    def __init__(self, activate: Callable[[Tensor], Tensor], pooled: int = 2) -> None:
        super().__init__()
        self.conv, self.activate, self.pooled = nn.Conv2d(3, 8, 3), activate, pooled

    def forward(self, images: Tensor) -> Tensor:
        return functional.max_pool2d(self.activate(self.conv(images)), self.pooled)


def test_networks_with_other_operators_differ_even_if_their_weights_do_not():
    made = [
        hash_operators(model, IMAGE)
        for model in (
            *(network(), network(activation=nn.SiLU), network((64, 96, 40)), network(kernel=5)),
            *(Functional(functional.relu), Functional(functional.silu), Functional(functional.relu, pooled=3)),
        )
    ]
    assert len(set(made)) == len(made)
    assert hash_operators(network().train(), IMAGE) == made[0]  # weights and modes make no difference


def test_a_table_serves_a_network_of_other_classes(table: LatencyTable):
    model, channels, image = mapped(network(classes=100))
    require_same_network(table, model, channels, image)
    assert with_latency(channels.costs, table).of("latency") > 0


@pytest.mark.parametrize(
    "other", [network(activation=nn.SiLU), network(kernel=5), nn.Sequential(*network()[:6], nn.Flatten(1))]
)
def test_a_table_of_other_layers_is_refused(table: LatencyTable, other: nn.Module):
    with pytest.raises(PlanError, match="is of a network with other layers than this one"):
        require_same_network(table, *mapped(other))


def test_older_tables_are_told_by_their_widths(table: LatencyTable):
    older = LatencyTable.from_json({key: value for key, value in table.to_json().items() if key != "modules"})
    require_same_network(older, *mapped(network(activation=nn.SiLU)))  # it cannot tell
    wide = map_channels(network((64, 96, 96)), IMAGE)
    with pytest.raises(PlanError, match="group '4' with 48 channels, which has 96 channels in this network"):
        with_latency(wide.costs, older)
    deep = nn.Sequential(*network()[:6], nn.Conv2d(48, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).eval()
    with pytest.raises(PlanError, match="does not follow group '6', which can be cut in this network"):
        require_same_network(older, *mapped(deep))
