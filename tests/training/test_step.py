"""The gradient step that all training loops share, and the check for divergence."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from passdeploy.recipe import OptimizerSpec
from passdeploy.training.optimizers import make_optimizer
from passdeploy.training.state import TrainState
from passdeploy.training.step import divergence, gradient_step_
from tests.device_reads import DeviceReads


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


def test_all_weights_are_looked_at_in_one_read():
    weights = [torch.ones(2), torch.zeros(3), torch.ones(1)]
    with DeviceReads(weights) as reads:
        assert divergence(1.0, weights) is None
    assert reads.count == 1


def scaled_state(name: str, *, is_fused: bool = True) -> TrainState:
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    optimizer = make_optimizer(net, OptimizerSpec(name=name, lr=0.1), is_fused=is_fused)
    return TrainState(net, optimizer, {}, scaler=torch.amp.GradScaler("cpu", init_scale=4.0))


def scaled_step_(state: TrainState, factor: float) -> None:
    state.optimizer.zero_grad()
    loss = factor * state.model(torch.ones(1, 2)).square().sum()
    clip_ = partial(nn.utils.clip_grad_norm_, [state.model.weight], 5.0)
    gradient_step_(loss, {state.optimizer: [state.model.weight]}, scaler=state.scaler, change_gradients_=clip_)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_fused_step_with_a_scaled_loss_reads_nothing_and_skips_an_overflow(name: str):
    fused, plain = scaled_state(name), scaled_state(name, is_fused=False)
    before = fused.model.weight.detach().clone()
    with DeviceReads([fused.model.weight]) as reads:
        scaled_step_(fused, math.inf)  # as the first steps of fp16 often do
        assert reads.count == 0
    assert torch.equal(fused.model.weight, before)
    assert fused.scaler.get_scale() == 2
    with DeviceReads([fused.model.weight, plain.model.weight]) as reads:
        for _ in range(3):
            scaled_step_(fused, 1.0)
        assert reads.count == 0
        scaled_step_(plain, 1.0)
        assert reads.count > 0  # the stand-in sees what the fused kernel avoids
    for _ in range(2):
        scaled_step_(plain, 1.0)
    torch.testing.assert_close(fused.model.weight, plain.model.weight)
    assert not torch.equal(fused.model.weight, before)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_fused_optimizer_resumes_with_the_same_bits(name: str):
    whole, resumed = scaled_state(name), scaled_state(name)
    scaled_step_(whole, 1.0)
    tensors, facts = whole.state_dict()
    resumed.load_state_dict({key: tensor.clone() for key, tensor in tensors.items()}, facts)
    for state in (whole, resumed):
        scaled_step_(state, 1.0)
    assert torch.equal(whole.model.weight, resumed.model.weight)
