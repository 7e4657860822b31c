"""The masked network: slimming it during mask learning changes how long a step takes and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.channels.plan import Plan
from passdeploy.grouping.find import map_channels
from passdeploy.recipe import OptimizerSpec
from passdeploy.sparsity import shrinking
from passdeploy.sparsity.learn import Learned, PassSettings, learn_masks
from passdeploy.sparsity.shrinking import ShrinkingNetwork
from passdeploy.sparsity.weight_trainer import CoTrainedWeights
from tests import nets
from tests.sparsity.test_learn import IMAGE, stripes

BATCHES = [(images.double(), labels) for images, labels in (stripes(16, seed) for seed in range(4))]
SPECS = {"sgd": OptimizerSpec(lr=0.05), "adamw": OptimizerSpec(name="adamw", lr=0.01)}


def randomised(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nets.randomise_(kind()).double().eval()


def learned(net: nn.Module, optimizer: str, weights: str) -> Learned:
    channels = map_channels(net.float(), IMAGE)
    settings = PassSettings(
        steps=12,
        round_to=1,
        prompt_kind="none",
        hypernet_kind="none",
        weights=weights,
        distill=0.5,
        weights_optimizer=SPECS[optimizer],
    )
    return learn_masks(
        net.double(),
        channels.groups,
        BATCHES,
        F.cross_entropy,
        costs=channels.costs,
        budget={"macs": 0.3},
        settings=settings,
    )


@pytest.mark.parametrize("weights", ["trained", "frozen"])
@pytest.mark.parametrize("optimizer", SPECS)
@pytest.mark.parametrize(
    "kind", [nets.PaddedShortcut, nets.Concatenated, nets.Depthwise, nets.Grouped, nets.Shuffled, nets.Tied]
)
def test_the_result_is_the_same_whether_the_network_is_slimmed_or_not(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], optimizer: str, weights: str
):
    cuts = []
    shrink_ = ShrinkingNetwork.shrink_
    monkeypatch.setattr(ShrinkingNetwork, "shrink_", lambda self, plan: cuts.append(shrink_(self, plan)))
    slimmed = learned(randomised(kind), optimizer, weights)
    assert sum(cuts) >= 2
    monkeypatch.setattr(shrinking, "SLACK", 1.0)  # never
    whole = learned(randomised(kind), optimizer, weights)
    assert slimmed.plan == whole.plan
    torch.testing.assert_close(torch.tensor(slimmed.losses), torch.tensor(whole.losses), rtol=1e-5, atol=1e-6)
    if weights == "frozen":
        assert slimmed.weights is None
        return
    channels = map_channels(randomised(kind).float(), IMAGE)
    slims = [shrinking.slim(result.weights, channels.groups, result.plan) for result in (slimmed, whole)]
    for one, other in zip(*(network.state_dict().values() for network in slims), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_co_trained_network_has_only_the_kept_channels_and_the_restored_one_has_all():
    net = randomised(nets.Plain)
    channels = map_channels(net.float(), IMAGE)
    co_trained = CoTrainedWeights(net, SPECS["sgd"])
    network = ShrinkingNetwork(net, channels.prunable, channels.costs, co_trained)
    halves = Plan({group.name: tuple(range(1, group.width, 2)) for group in channels.prunable})
    assert network.shrink_(halves)
    assert not network.shrink_(halves)  # no further channel is removed
    assert sum(p.numel() for p in co_trained.parameters) < 0.5 * sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        for parameter in co_trained.parameters:
            parameter.add_(1.0)
    group = channels.prunable[0]
    slot = group.slots[0]
    before, after = (_filters(model, slot.tensor) for model in (net, network.restored()))
    assert torch.equal(after[0::2], before[0::2])  # removed: as in the original
    assert not torch.equal(after[1::2], before[1::2])


def test_a_removed_channel_is_ranked_last_and_never_kept_again():
    net = randomised(nets.Plain).float()
    channels = map_channels(net, IMAGE)
    network = ShrinkingNetwork(net, channels.prunable, channels.costs, None)
    name, width = channels.prunable[0].name, channels.prunable[0].width
    everything = {group.name: tuple(range(group.width)) for group in channels.prunable}
    assert network.shrink_(Plan({**everything, name: (width - 1,)}))
    ranked = network.demote_removed(torch.ones(network.channels.total))
    assert int(network.channels.split(ranked)[name].argmax()) == width - 1
    assert network.without_removed(Plan(everything)).kept[name] == (width - 1,)


def _filters(model: nn.Module, name: str) -> Tensor:
    return dict(model.named_parameters())[name].detach().flatten(1)
