"""The gradient step that all training loops share, and the check for divergence."""

from __future__ import annotations

import math

import torch
from torch import nn

from passdeploy.training.step import divergence, gradient_step_


def test_every_optimiser_takes_a_step_with_the_changed_gradients():
    nets = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    before = [net.weight.item() for net in nets]
    optimizers = {torch.optim.SGD(net.parameters(), lr): [net.weight] for net, lr in zip(nets, (0.1, 0.2), strict=True)}
    loss = sum(net.weight.sum() for net in nets)  # gradients of 1
    gradient_step_(loss, optimizers, change_gradients_=lambda: nets[0].weight.grad.mul_(3))
    moved = [old - net.weight.item() for old, net in zip(before, nets, strict=True)]
    torch.testing.assert_close(torch.tensor(moved), torch.tensor([0.3, 0.2]))


def test_divergence_names_the_loss_before_the_weights():
    broken = [torch.ones(2), torch.tensor([1.0, math.inf])]
    assert divergence(math.nan, broken) == "the loss is nan"
    assert divergence(1.0, broken) == "a weight is not a number"
    assert divergence(1.0, broken[:1]) is None
