"""Networks that change themselves when they run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from passdeploy.models.own_state import OwnState


class Meter:
    value = 0.0

    def update(self, value: float) -> None:
        self.value = value


class Keeps(nn.Module):
    """Changes itself in one way when it is called."""

    def __init__(self, change: Callable[[Keeps], None]) -> None:
        super().__init__()
        self.norm, self.change = nn.BatchNorm2d(3), change
        self.register_buffer("queue", torch.zeros(4))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.seen, self.table, self.kept, self.last, self.calls = list[int](), {"calls": 0}, torch.zeros(2), None, 0
        self.meter, self.meters, self.counts = Meter(), [Meter()], np.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.change(self)
        return self.norm(x)


def has_changed(change: Callable[[Keeps], None]) -> bool:
    net = Keeps(change)
    state = OwnState(net)
    net(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    return state.has_changed()


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.queue.add_(1),
        lambda net: setattr(net, "queue", torch.zeros(5)),
        lambda net: net.register_buffer("other", torch.zeros(1)),
        lambda net: net.norm.weight.data.mul_(2),
        lambda net: net.seen.append(1),
        lambda net: net.table.update(more=1),
        lambda net: net.kept.add_(1),
        lambda net: setattr(net, "last", torch.zeros(())),
        lambda net: setattr(net, "calls", net.calls + 1),
        lambda net: setattr(net, "late", 1),
        lambda net: net.meter.update(0.5),
        lambda net: net.meters[0].update(0.5),
        lambda net: net.counts.fill(1),
    ],
)
def test_a_change_is_seen(change: Callable[[Keeps], None]):
    assert has_changed(change)


def test_statistics_of_batch_norms_are_none():
    assert not has_changed(lambda net: None)
