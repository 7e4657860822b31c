"""Tests of recurrent networks: units are removed from every gate, every layer and both directions alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passdeploy.channels.plan import Plan
from passdeploy.grouping.find import find_groups
from passdeploy.slimming.size_attributes import size_attributes_after
from passdeploy.slimming.slim import resize_, slim
from passdeploy.slimming.verify import verify

SEQUENCE = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))


class Reader(nn.Module):
    """A convolution along time, a recurrent network, and a linear layer on the last state."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 8, 3, padding=1)
        self.rnn = kind(8, 6, batch_first=True, **options)
        width = options.get("proj_size", 6) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.rnn(self.stem(x).relu().transpose(1, 2))
        return self.head(steps[:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}], ids=["one", "deep"])
def test_units_are_removed_from_every_gate_and_direction(kind: type[nn.RNNBase], options: dict[str, Any]):
    net = Reader(kind, **options).eval()
    groups = find_groups(net, SEQUENCE)
    assert [(group.width, group.is_prunable) for group in groups] == [(8, True), (6, True), (5, False)]
    plan = Plan({"stem": (0, 2, 5), "rnn": (1, 2, 3, 5)})
    assert verify(net, groups, plan, SEQUENCE, tolerance=1e-5) <= 1e-5

    smaller = slim(net, groups, plan)
    assert (smaller.rnn.input_size, smaller.rnn.hidden_size) == (3, 4)
    rebuilt = Reader(kind, **options).eval()
    resize_(rebuilt, smaller.state_dict(), size_attributes_after(groups, plan))
    assert torch.equal(rebuilt(SEQUENCE), smaller(SEQUENCE))
    smaller.train()(SEQUENCE).sum().backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())


def test_removing_units_changes_the_function():
    net = Reader(nn.LSTM).eval()
    groups = find_groups(net, SEQUENCE)
    smaller = slim(net, groups, Plan({"rnn": (0, 1)}))
    assert not torch.allclose(smaller(SEQUENCE), net(SEQUENCE), atol=1e-3)


def test_recurrent_networks_with_projections_are_protected():
    net = Reader(nn.LSTM, proj_size=4).eval()
    groups = {group.name: group for group in find_groups(net, SEQUENCE)}
    assert not groups["rnn"].is_prunable
    assert "projections" in groups["rnn"].reason
