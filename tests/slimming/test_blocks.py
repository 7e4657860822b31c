"""Blocks left out: the slim network computes what the one does whose branches are zero, and has nothing of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer

from passdeploy import Plan, count, masked, slim, verify
from passdeploy.channels.blocks import replacements_of
from passdeploy.channels.groups import ChannelMap
from passdeploy.errors import EquivalenceError, PlanError
from passdeploy.grouping.find import map_channels
from passdeploy.models.cifar_resnet import resnet20_cifar
from passdeploy.slimming import substitutes
from passdeploy.slimming.agreement import relative_error
from passdeploy.slimming.size_attributes import size_attributes_after
from passdeploy.slimming.slim import resize_
from passdeploy.slimming.substitutes import groups_left
from tests import nets
from tests.random_networks import BLOCK_FORMS, BatchNorm, Block, Conv, Linear, MeanPool, Network, Tokens, build
from tests.random_networks import LayerNorm as Norm

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, ChannelMap]:
    torch.manual_seed(0)
    net = nets.randomise_(resnet20_cifar())
    return net, map_channels(net, IMAGES, with_blocks=True)


def widths_of(channels: ChannelMap) -> dict[str, tuple[int, ...]]:
    """Two thirds of every group that can be cut."""
    return {group.name: tuple(range(group.width - group.width // 3)) for group in channels.prunable}


def names_of(channels: ChannelMap) -> list[str]:
    return [block.name for block in channels.blocks if block.is_prunable]


def answers(net: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        found: Tensor = net.eval()(images)
    return found


def test_every_block_alone_is_left_out_to_the_bit(resnet: tuple[nn.Module, ChannelMap]):
    net, channels = resnet
    dense = answers(net)
    assert len(names_of(channels)) == 7
    for name in names_of(channels):
        plan = Plan({}, (name,))
        smaller = answers(slim(net, channels.groups, plan, channels.blocks))
        assert torch.equal(smaller, answers(masked(net, channels.groups, plan, channels.blocks))), name
        assert relative_error(dense, smaller) > 1e-3, name


def test_nothing_of_a_skipped_block_is_left(resnet: tuple[nn.Module, ChannelMap]):
    net, channels = resnet
    name = names_of(channels)[1]
    smaller = slim(net, channels.groups, Plan({}, (name,)), channels.blocks)
    assert type(smaller.get_submodule(name)) is nn.Identity
    gone = {key for key in net.state_dict() if key.startswith(f"{name}.")}
    assert gone
    assert smaller.state_dict().keys() == net.state_dict().keys() - gone


@pytest.mark.parametrize("form", BLOCK_FORMS)
def test_blocks_of_every_form_and_widths_together(form: str):
    is_tokens = len(form) % 2 == 1
    body = (Norm(), Linear(7), Linear(6)) if is_tokens else (Conv(7), BatchNorm(), Conv(6))
    layers = (Conv(6), *((Tokens(),) if is_tokens else ()), Block(body), Block(body, form), MeanPool(), Linear(5))
    net, images = build(Network((3, 4, 4), layers), 0), torch.randn(2, 3, 4, 4)
    channels = map_channels(net, images, with_blocks=True)
    names = names_of(channels)
    assert len(names) > (form not in MUST_STAY)
    for plan in (Plan({}, tuple(names)), Plan(widths_of(channels), tuple(names[-1:]))):
        verify(net, channels.groups, plan, images, tolerance=1e-5, blocks=channels.blocks)


MUST_STAY = {"twice", "used elsewhere", "input times two", "concatenated"}


def test_costs_are_those_of_the_slim_network(resnet: tuple[nn.Module, ChannelMap]):
    net, channels = resnet
    plan = Plan(widths_of(channels), tuple(names_of(channels)[::2]))
    counted = count(slim(net, channels.groups, plan, channels.blocks), IMAGES)
    priced = [channels.costs.of(kind, plan.widths()) for kind in ("params", "macs")]
    assert priced == [counted.params, counted.macs]
    assert priced[0] < channels.costs.of("params", Plan(plan.kept).widths())


def test_a_cut_of_a_group_that_goes_with_a_block_is_ignored(resnet: tuple[nn.Module, ChannelMap]):
    net, channels = resnet
    block = next(block for block in channels.blocks if block.is_prunable)
    assert block.groups
    plan = Plan({}, (block.name,))
    cutting = replace(plan, kept=dict.fromkeys(block.groups, (0,)))
    states = [slim(net, channels.groups, one, channels.blocks).state_dict() for one in (plan, cutting)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    verify(net, channels.groups, cutting, IMAGES, tolerance=1e-5, blocks=channels.blocks)


def test_a_slim_network_is_rebuilt_from_its_factory_and_its_tensors(resnet: tuple[nn.Module, ChannelMap]):
    net, channels = resnet
    plan = Plan(widths_of(channels), tuple(names_of(channels)[1:5]))
    smaller = slim(net, channels.groups, plan, channels.blocks)
    rebuilt = resnet20_cifar()
    sizes = size_attributes_after(channels.groups, plan, channels.blocks)
    resize_(rebuilt, smaller.state_dict(), sizes, replacements_of(channels.blocks, plan.skipped))
    assert torch.equal(answers(rebuilt), answers(smaller))


def test_zeros_take_the_place_of_a_branch_that_the_input_is_added_to_in_place():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            branch = self.branch(x)
            branch += x
            return self.head(branch.sigmoid())

    net, tokens = InPlace().eval(), torch.randn(2, 3, 6)
    channels = map_channels(net, tokens, with_blocks=True)
    (block,) = channels.blocks
    assert [one.by for one in block.replacements] == ["zeros"]
    smaller = slim(net, channels.groups, Plan({}, ("branch",)), channels.blocks)
    assert torch.equal(answers(smaller, tokens), net.head(net.stem(tokens).sigmoid()))


def test_groups_lose_what_goes_with_a_block(resnet: tuple[nn.Module, ChannelMap]):
    net, channels = resnet
    block = next(block for block in channels.blocks if block.is_prunable)
    plan = Plan({}, (block.name,))
    left = {group.name: group for group in groups_left(channels.groups, plan, channels.blocks)}
    assert left.keys() == {group.name for group in channels.groups} - set(block.groups)
    names = slim(net, channels.groups, plan, channels.blocks).state_dict().keys()
    for group in channels.groups:
        if group.name in left:
            kept = [slot for slot in group.slots if slot.tensor in names]
            assert list(left[group.name].slots) == kept
            assert kept


def test_a_plan_that_skips_blocks_needs_the_blocks(resnet: tuple[nn.Module, ChannelMap]):
    net, channels = resnet
    with pytest.raises(PlanError, match="no blocks of the network were given"):
        slim(net, channels.groups, Plan({}, (names_of(channels)[0],)))


def test_a_branch_is_muted_even_where_it_is_not_finite():
    net = build(Network((3, 4, 4), (Conv(6), Block((Conv(6),)), MeanPool(), Linear(5))), 0)
    images = torch.randn(2, 3, 4, 4)
    channels = map_channels(net, images, with_blocks=True)
    with torch.no_grad():
        net[1].body[0].weight.fill_(torch.inf)
    reference = masked(net, channels.groups, Plan({}, ("1",)), channels.blocks)
    assert answers(reference, images).isfinite().all()


def test_stochastic_depth_and_training_mode():
    torch.manual_seed(0)
    net: nn.Module = SwinTransformer([4, 4], 8, [2], [2], [4, 4], stochastic_depth_prob=0.5, num_classes=5)
    images = torch.randn(2, 3, 32, 32)
    channels = map_channels(net, images, with_blocks=True)
    names = names_of(channels)
    assert len(names) == 4
    smaller = slim(net.train(), channels.groups, Plan(widths_of(channels), tuple(names)), channels.blocks)
    assert smaller.training
    # Nothing random is left, since every block goes.
    assert torch.equal(smaller(images), smaller(images))
    verify(net, channels.groups, Plan({}, tuple(names[:3])), images, tolerance=1e-5, blocks=channels.blocks)


# What verify finds


def test_branches_that_stay_are_an_error(resnet: tuple[nn.Module, ChannelMap], monkeypatch: pytest.MonkeyPatch):
    net, channels = resnet
    monkeypatch.setattr(substitutes, "substitute_of", lambda _: nn.Tanh())
    with pytest.raises(EquivalenceError, match="differs from the masked one"):
        verify(net, channels.groups, Plan({}, (names_of(channels)[0],)), IMAGES, tolerance=1e-5, blocks=channels.blocks)


def test_skipping_nothing_is_an_error(resnet: tuple[nn.Module, ChannelMap], monkeypatch: pytest.MonkeyPatch):
    net, channels = resnet
    plan = Plan({}, (names_of(channels)[0],))
    for module in ("masked", "slim"):  # both networks are copies of the dense one
        copied: Callable[..., Any] = lambda model, *_: copy.deepcopy(model)  # noqa: E731
        monkeypatch.setattr(f"passdeploy.slimming.verify.{module}", copied)
    monkeypatch.setattr("passdeploy.slimming.verify.structure_fault", lambda *_: "")
    with pytest.raises(EquivalenceError, match="the plan had no effect"):
        verify(net, channels.groups, plan, IMAGES, tolerance=1e-5, blocks=channels.blocks)


def test_weights_that_are_left_of_a_block_are_an_error(
    resnet: tuple[nn.Module, ChannelMap], monkeypatch: pytest.MonkeyPatch
):
    class KeepsWeights(nn.Identity):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

    net, channels = resnet
    monkeypatch.setattr(substitutes, "substitute_of", lambda _: KeepsWeights())
    name = names_of(channels)[1]
    with pytest.raises(EquivalenceError, match=f"{name}.weight is left of a block that is skipped"):
        verify(net, channels.groups, Plan({}, (name,)), IMAGES, tolerance=1e-5, blocks=channels.blocks)
