"""Blocks in mask learning: their scores, their gates, and how they fade and go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import passdeploy as pd
from passdeploy.channels.blocks import presence
from passdeploy.channels.groups import ChannelMap
from passdeploy.grouping.find import map_channels
from passdeploy.recipe import OptimizerSpec
from passdeploy.sparsity.baselines import taylor_scores, with_block_sums
from passdeploy.sparsity.block_gates import BlockGates
from passdeploy.sparsity.learn import PassSettings, learn_masks
from passdeploy.sparsity.shrinking import ShrinkingNetwork
from passdeploy.sparsity.weight_trainer import CoTrainedWeights
from tests import nets
from tests.sparsity.test_learn import IMAGE, stripes

BATCHES = [stripes(16, seed) for seed in range(4)]


class Stack(nn.Module):
    """A stem and four residual blocks, the last of which adds in place and is followed by an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nets.conv_bn(3, 8)
        self.inner = nn.ModuleList(nn.Sequential(nets.conv_bn(8, 6), *nets.conv_bn(6, 8)[:-1]) for _ in range(4))
        self.head = nets.Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.inner[:3]:
            x = x + block(x)
        branch = self.inner[3](x)
        branch += x
        return self.head(branch.relu())


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nets.randomise_(Stack()).eval()


@pytest.fixture
def channels(net: nn.Module) -> ChannelMap:
    return map_channels(net, IMAGE, with_blocks=True)


def test_gates_of_one_change_nothing_and_gates_of_zero_skip(net: nn.Module, channels: ChannelMap):
    gates, images = BlockGates(channels.costs.blocks, torch.device("cpu")), BATCHES[0][0]
    with gates.on(net):
        assert_close(net(images), net(images.clone()))
    whole = net(images)
    with gates.on(net):
        assert torch.equal(net(images), whole)
    for number, block in enumerate(channels.costs.blocks):
        gates.set_([float(other != number) for other in range(len(channels.costs.blocks))])
        skipped = pd.slim(net, channels.groups, pd.Plan({}, (block.name,)), channels.blocks)
        with gates.on(net):
            assert_close(net(images), skipped(images))


def test_the_taylor_score_of_a_block_is_the_squared_derivative_by_its_gate(net: nn.Module, channels: ChannelMap):
    batches = [(images.double(), labels) for images, labels in BATCHES[:2]]
    net = net.double()
    scores = taylor_scores(net, channels.prunable, batches, F.cross_entropy, blocks=channels.costs.blocks)
    gates, step = BlockGates(channels.costs.blocks, torch.device("cpu")), 1e-4
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.momentum = 0.0
    for number, block in enumerate(channels.costs.blocks):
        squares = []
        for images, labels in batches:
            losses = []
            for gate in (1 + step, 1 - step):
                gates.set_([gate if other == number else 1.0 for other in range(len(channels.costs.blocks))])
                with torch.no_grad(), gates.on(net):
                    output = net(images)
                losses.append(float(F.cross_entropy(output, labels)))
            squares.append(((losses[0] - losses[1]) / (2 * step)) ** 2)
        assert float(scores[presence(block.name)]) == pytest.approx(sum(squares) / len(squares), rel=2e-3)


def test_other_scores_count_a_block_as_much_as_its_channels(channels: ChannelMap):
    block = channels.costs.blocks[0]
    scores = with_block_sums({name: torch.full((6,), 0.5) for name in block.groups}, channels.costs.blocks)
    assert scores[presence(block.name)].tolist() == [3.0 * len(block.groups)]


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_removed_block_fades_and_is_cut_once_it_is_gone(net: nn.Module, channels: ChannelMap, is_trained: bool):
    co_trained = CoTrainedWeights(net, OptimizerSpec(lr=0.1)) if is_trained else None
    network = ShrinkingNetwork(net, channels.prunable, channels.costs, co_trained, fade_steps=4)
    first, second = channels.costs.blocks[1].name, channels.costs.blocks[3].name
    images, reference = BATCHES[0][0], ShrinkingNetwork(net, channels.prunable, channels.costs, None)
    whole = reference.run(images)
    assert not network.shrink_(pd.Plan({}, (first,)))  # it fades first
    outputs = [network.run(images) for _ in range(5)]
    reference.shrink_(pd.Plan({}, (first,)))
    without = reference.run(images)
    assert_close(outputs[3], without)
    assert torch.equal(outputs[3], outputs[4])
    assert not torch.allclose(outputs[0], whole)
    assert not torch.allclose(outputs[0], without)
    assert network.shrink_(pd.Plan({}, (first, second)))  # the first is cut, the second begins to fade
    network.run(images)
    masks, gates = network.channel_gradients()
    assert len(masks) == len(gates) == network.channels.total
    for _ in range(4):
        output = network.run(images)
    reference.shrink_(pd.Plan({}, (first, second)))
    assert_close(output, reference.run(images))
    assert {name for name, _ in network.restored().named_parameters()} == {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize("kind", ["lstm", "none"])
def test_blocks_and_channels_are_learned_under_one_budget(net: nn.Module, channels: ChannelMap, kind: str):
    settings = PassSettings(steps=12, round_to=1, prompt_size=2, hypernet_kind=kind, hidden=8, fade_steps=2)
    learned = learn_masks(
        net, channels.groups, BATCHES, F.cross_entropy, costs=channels.costs, budget={"macs": 0.15}, settings=settings
    )
    assert all(learned.scores[presence(block.name)].shape == (1,) for block in channels.costs.blocks)
    assert learned.plan.skipped
    assert channels.costs.of("macs", learned.plan.widths()) <= 0.15 * channels.costs.of("macs")
    assert learned.weights is not None
    smaller = pd.slim(learned.weights, channels.groups, learned.plan, channels.blocks)
    assert_close(smaller(IMAGE), pd.masked(learned.weights, channels.groups, learned.plan, channels.blocks)(IMAGE))
    assert pd.count(smaller, IMAGE).macs == channels.costs.of("macs", learned.plan.widths())
