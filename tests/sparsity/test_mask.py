"""Masks on weights: the masked network, and gradients by masks and gates that follow from those by the weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.grouping.find import map_channels
from passdeploy.recipe import OptimizerSpec
from passdeploy.slimming.masked import masked
from passdeploy.sparsity import shrinking
from passdeploy.sparsity.mask import batch_statistics_only
from passdeploy.sparsity.shrinking import ShrinkingNetwork
from passdeploy.sparsity.weight_trainer import CoTrainedWeights
from tests import nets
from tests.sparsity.test_learn import IMAGE, stripes

KINDS = [nets.Residual, nets.Concatenated, nets.Depthwise, nets.Grouped, nets.SqueezeExcite, nets.Shuffled, nets.Tied]
IMAGES, LABELS = stripes(16, 0)


def randomised(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nets.randomise_(kind()).double().eval()


def groups_of(net: nn.Module) -> Sequence[ChannelGroup]:
    return map_channels(copy.deepcopy(net).float(), IMAGE).prunable


def network_of(net: nn.Module, co_trained: CoTrainedWeights | None = None) -> ShrinkingNetwork:
    channels = map_channels(copy.deepcopy(net).float(), IMAGE)
    return ShrinkingNetwork(net, channels.prunable, channels.costs, co_trained)


def every_other(groups: Sequence[ChannelGroup]) -> Plan:
    return Plan({group.name: tuple(range(0, group.width, 2)) for group in groups})


def gradients_of_factors(
    net: nn.Module, groups: Sequence[ChannelGroup], plan: Plan, images: Tensor, *, of_gates: bool
) -> Tensor:
    """Multiply the slices of every channel by factors, 1 where it is kept, and differentiate a loss by them."""
    factors = [torch.zeros(group.width, dtype=torch.float64) for group in groups]
    for group, factor in zip(groups, factors, strict=True):
        factor[list(plan.kept[group.name])] = 1.0
        factor.requires_grad_()
    weights = {name: parameter.detach() for name, parameter in net.named_parameters()}
    for group, factor in zip(groups, factors, strict=True):
        readers = [slot for slot in group.slots if slot.is_input] or group.slots
        for slot in group.slots:
            if slot.tensor in weights:
                value = factor if not of_gates or slot in readers else factor.detach()
                scale = torch.ones(weights[slot.tensor].size(slot.dim), dtype=torch.float64)
                scale = scale.index_put((slot.index,), value[:, None].expand_as(slot.index))
                shape = [-1 if dim == slot.dim else 1 for dim in range(weights[slot.tensor].ndim)]
                weights[slot.tensor] = weights[slot.tensor] * scale.view(shape)
    output = torch.func.functional_call(batch_statistics_only(net), weights, (images,))
    return torch.cat(torch.autograd.grad(output.square().mean(), factors))


@pytest.mark.parametrize("removes", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_masks_and_gates_are_those_of_factors_on_the_weights(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], removes: bool
):
    monkeypatch.setattr(shrinking, "SLACK", 1.0)  # the network is masked and not slimmed
    net = randomised(kind)
    groups = groups_of(net)
    plan = every_other(groups) if removes else Plan({group.name: tuple(range(group.width)) for group in groups})
    network = network_of(net)
    network.shrink_(plan)
    network.run(IMAGES.double()).square().mean().backward()
    by_masks, by_gates = network.channel_gradients()
    assert bool(by_masks.eq(0).any()) is removes
    for gradients, of_gates in ((by_masks, False), (by_gates, True)):
        expected = gradients_of_factors(net, groups, plan, IMAGES.double(), of_gates=of_gates)
        torch.testing.assert_close(gradients, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_slimmed_network_are_those_of_the_masked_one(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]
):
    net = randomised(kind)
    plan, found = every_other(groups_of(net)), []
    for slack in (0.0, 1.0):
        monkeypatch.setattr(shrinking, "SLACK", slack)
        network = network_of(net)
        assert network.shrink_(plan) is (slack == 0.0)
        network.run(IMAGES.double()).square().mean().backward()
        found.append(network.channel_gradients())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_masked_network_of_learning_is_the_masked_network(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]):
    monkeypatch.setattr(shrinking, "SLACK", 1.0)
    net = randomised(kind)
    groups, before = groups_of(net), copy.deepcopy(net.state_dict())
    network = network_of(net)
    assert not network.shrink_(every_other(groups))
    reference = batch_statistics_only(masked(net, groups, every_other(groups)))
    torch.testing.assert_close(network.run(IMAGES.double()), reference(IMAGES.double()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("spec", [OptimizerSpec(lr=0.05), OptimizerSpec(name="adamw", lr=0.01)])
def test_the_weights_of_removed_channels_stay_zero_while_the_others_are_trained(
    monkeypatch: pytest.MonkeyPatch, spec: OptimizerSpec
):
    monkeypatch.setattr(shrinking, "SLACK", 1.0)
    net = randomised(nets.Residual)
    co_trained = CoTrainedWeights(net, spec)
    network, groups = network_of(net, co_trained), groups_of(net)
    for step in range(4):
        if step == 2:  # when the optimiser has momentum
            network.shrink_(every_other(groups))
        F.cross_entropy(network.run(IMAGES.double()), LABELS).backward()
        co_trained.optimizer.step()
    trained = dict(co_trained.network.named_parameters())
    for group in groups:
        for slot in group.slots:
            if slot.tensor in trained:
                slices = trained[slot.tensor].movedim(slot.dim, 0)
                assert slices[slot.index[1::2].flatten()].abs().max() == 0
                assert slices[slot.index[::2].flatten()].abs().max() > 0


def test_frozen_parameters_have_gradients_in_the_copy_and_none_in_the_network():
    net = randomised(nets.Residual)
    net.stem[0].weight.requires_grad_(False)
    for co_trained in (None, CoTrainedWeights(net, OptimizerSpec(lr=0.05))):
        network = network_of(net, co_trained)
        network.run(IMAGES.double()).square().mean().backward()
        expected = gradients_of_factors(
            net,
            groups_of(net),
            Plan({g.name: tuple(range(g.width)) for g in groups_of(net)}),
            IMAGES.double(),
            of_gates=False,
        )
        torch.testing.assert_close(network.channel_gradients()[0], expected)
        assert all(parameter.grad is None for parameter in net.parameters())


def test_weights_of_channels_that_are_masked_but_present_are_restored_as_they_were(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shrinking, "SLACK", 1.0)
    net = randomised(nets.Plain)
    network, groups = network_of(net, CoTrainedWeights(net, OptimizerSpec(lr=0.05))), groups_of(net)
    assert not network.shrink_(every_other(groups))
    with torch.no_grad():
        for parameter in network._network.parameters():
            parameter.add_(1.0)
    slot = groups[0].slots[0]
    before, after = (dict(model.named_parameters())[slot.tensor].flatten(1) for model in (net, network.restored()))
    assert torch.equal(after[1::2], before[1::2])
    assert not torch.equal(after[::2], before[::2])
