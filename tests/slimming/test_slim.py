"""The promise of the whole project: a slim network computes what the masked one did."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from passdeploy import Plan, count, find_groups, masked, slim, verify
from passdeploy.channels.groups import ChannelGroup
from passdeploy.errors import EquivalenceError, PlanError
from passdeploy.grouping.find import map_channels
from passdeploy.grouping.gather import GroupBuilder
from passdeploy.models.prompt import VisualPrompt, with_prompt
from passdeploy.slimming.agreement import relative_error
from passdeploy.slimming.slim import resize_
from passdeploy.tracing.trace_channels import trace_channels
from tests import nets
from tests.tracing.test_recurrent import SEQUENCE, Reader

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def half_of(groups: tuple[ChannelGroup, ...], seed: int = 0) -> Plan:
    """A random half of every prunable group."""
    chance = torch.Generator().manual_seed(seed)
    return Plan(
        {
            group.name: tuple(
                sorted(torch.randperm(group.width, generator=chance)[: math.ceil(group.width / 2)].tolist())
            )
            for group in groups
            if group.is_prunable
        }
    )


def built(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nets.randomise_(kind())


@pytest.mark.parametrize("kind", nets.EVERY, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_a_slim_network_computes_what_the_masked_one_does(kind: type[nn.Module], seed: int):
    net = built(kind, seed)
    groups = find_groups(net, IMAGES)
    plan = half_of(groups, seed)
    smaller, reference = slim(net, groups, plan), masked(net, groups, plan)
    with torch.no_grad():
        dense, expected, found = net(IMAGES), reference(IMAGES), smaller(IMAGES)
    assert relative_error(expected, found) < 1e-5
    assert relative_error(dense, expected) > 1e-3  # the plan does change the function
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("kind", nets.EVERY, ids=lambda kind: kind.__name__)
def test_the_cost_model_prices_a_plan_as_the_slim_network_counts(kind: type[nn.Module]):
    net = built(kind)
    channels = map_channels(net, IMAGES)
    plan = half_of(channels.groups)
    counted = count(slim(net, channels.groups, plan), IMAGES)
    assert channels.costs.of("macs", plan.widths()) == counted.macs
    assert channels.costs.of("params", plan.widths()) == counted.params
    assert counted.macs < count(net, IMAGES).macs


def test_a_visual_prompt_is_no_part_of_what_a_network_counts():
    net = built(nets.Residual)
    assert count(with_prompt(net, VisualPrompt("padding", (3, 16, 16), 2)), IMAGES) == count(net, IMAGES)


def test_masking_one_channel_removes_all_it_contributes():
    net = built(nets.Residual)
    groups = find_groups(net, IMAGES)
    inner = next(group for group in groups if group.name == "inner.0.0.0")
    reference = masked(net, groups, Plan({inner.name: (0, 1, 2, 4, 5)}))
    by_hand = copy.deepcopy(net)
    by_hand.inner[0][1][0].weight.data[:, 3] = 0  # nobody reads channel 3
    with torch.no_grad():
        torch.testing.assert_close(reference(IMAGES), by_hand(IMAGES))


def test_slimming_leaves_the_network_as_it_was():
    net = built(nets.Residual).train()
    net.stem[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    groups = find_groups(net, IMAGES)
    smaller = slim(net, groups, half_of(groups))
    masked(net, groups, half_of(groups))
    assert net.training
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert smaller.training
    assert smaller.state_dict().keys() == before.keys()
    assert [p.requires_grad for p in smaller.parameters()] == [p.requires_grad for p in net.parameters()]


def test_modules_state_their_new_widths():
    net = built(nets.Depthwise)
    groups = find_groups(net, IMAGES)
    smaller = slim(net, groups, half_of(groups))
    depthwise, doubled, norm = smaller.block[1][0], smaller.doubled[0], smaller.block[1][1]
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (6, 6, 6)
    assert (doubled.in_channels, doubled.out_channels, doubled.groups) == (3, 6, 3)
    assert norm.num_features == 6
    assert smaller.head.fc.in_features == 6


def test_every_layer_of_torch_states_its_new_widths():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, affine=False),
        nn.ConvTranspose2d(8, 12, 3, groups=2),
        nn.GroupNorm(3, 12),
        nn.PReLU(12),
        nn.Conv2d(12, 5, 1),
    ).eval()
    groups = find_groups(net, IMAGES)
    smaller = slim(net, groups, half_of(groups))
    up, norm, prelu = smaller[2], smaller[3], smaller[4]
    assert smaller[1].num_features == smaller[0].out_channels == up.in_channels == up.weight.size(0) < 8
    assert up.out_channels == up.weight.size(1) * up.groups == smaller[5].in_channels < 12
    assert norm.num_channels == prelu.num_parameters == up.out_channels
    assert verify(net, groups, half_of(groups), IMAGES, tolerance=1e-5) <= 1e-5


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_states_its_new_sizes(kind: type[nn.RNNBase]):
    net = Reader(kind).eval()
    groups = find_groups(net, SEQUENCE)
    plan = Plan({"stem": (0, 2, 5), "rnn": (1, 2, 3, 5)})
    smaller = slim(net, groups, plan)
    assert (smaller.rnn.input_size, smaller.rnn.hidden_size) == (3, 4)
    assert verify(net, groups, plan, SEQUENCE, tolerance=1e-5) <= 1e-5


class CellReader(nn.Module):
    """A recurrent cell that reads pooled features."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.stem, self.cell, self.classify = nn.Conv2d(3, 16, 3), kind(16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(self.stem(x).relu().mean((2, 3)))
        return self.classify(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_recurrent_cell_states_its_new_sizes(kind: type[nn.RNNCellBase]):
    net = CellReader(kind).eval()
    groups = find_groups(net, IMAGES)
    plan = Plan({"stem": (0, 2, 5)})
    smaller = slim(net, groups, plan)
    assert (smaller.cell.input_size, smaller.cell.hidden_size) == (3, 8)
    assert verify(net, groups, plan, IMAGES, tolerance=1e-5) <= 1e-5


def test_an_embedding_states_its_new_width():
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.places, self.head = nn.Linear(6, 12), nn.Embedding(9, 12), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.stem(x) + self.places(torch.arange(9))).relu())

    net, tokens = Placed(), torch.randn(2, 9, 6)
    groups = find_groups(net, tokens)
    smaller = slim(net, groups, Plan({"stem": (0, 1, 5)}))
    assert (smaller.places.num_embeddings, smaller.places.embedding_dim) == (9, 3)
    assert verify(net, groups, Plan({"stem": (0, 1, 5)}), tokens, tolerance=1e-5) <= 1e-5


def test_masking_leaves_buffers_that_a_network_divides_by():
    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
            self.register_buffer("deviation", torch.rand(1, 8, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.stem(x) / self.deviation).relu())

    net = Divided()
    groups = find_groups(net, IMAGES)
    plan = Plan({"stem": (0, 1, 5)})
    assert masked(net, groups, plan)(IMAGES).isfinite().all()
    assert slim(net, groups, plan).deviation.shape == (1, 3, 1, 1)
    assert verify(net, groups, plan, IMAGES, tolerance=1e-5) <= 1e-5


def test_memory_order_and_trainability_stay():
    net = built(nets.Plain).to(memory_format=torch.channels_last)
    net.second[0].weight.requires_grad_(False)
    groups = find_groups(net, IMAGES)
    smaller = slim(net, groups, half_of(groups))
    for layer in (smaller.first[0], smaller.second[0]):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        assert not layer.weight.is_contiguous()
    assert [p.requires_grad for p in smaller.parameters()] == [p.requires_grad for p in net.parameters()]


def test_the_memory_order_of_videos_stays():
    net = nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.Conv3d(8, 6, 3), nn.Flatten()).eval()
    net.to(memory_format=torch.channels_last_3d)
    videos = torch.randn(2, 3, 6, 6, 6)
    groups = find_groups(net, videos)
    plan = Plan({"0": (0, 1, 5)})
    for layer in (slim(net, groups, plan)[0], slim(net, groups, plan)[2]):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last_3d)
        assert not layer.weight.is_contiguous()
    assert verify(net, groups, plan, videos, tolerance=1e-5) <= 1e-5


def test_a_plan_takes_the_named_channels_and_no_others():
    """Read the plan a second time, by hand: the removed rows and columns are gone and all others are as before."""
    net = built(nets.Residual)
    groups = find_groups(net, IMAGES)
    stem, inner = (next(group for group in groups if group.name == name) for name in ("stem.0", "inner.0.0.0"))
    smaller = slim(net, groups, Plan({stem.name: (1, 2, 7), inner.name: (0, 4)}))
    assert torch.equal(smaller.stem[0].weight, net.stem[0].weight[[1, 2, 7]])
    assert torch.equal(smaller.inner[0][0][0].weight, net.inner[0][0][0].weight[[0, 4]][:, [1, 2, 7]])
    assert torch.equal(smaller.inner[0][0][1].running_var, net.inner[0][0][1].running_var[[0, 4]])
    assert torch.equal(smaller.head.fc.weight, net.head.fc.weight[:, [1, 2, 7]])
    assert torch.equal(smaller.inner[1][0][1].running_var, net.inner[1][0][1].running_var)


def test_a_slim_network_trains():
    net = built(nets.SqueezeExcite)
    groups = find_groups(net, IMAGES)
    smaller = slim(net, groups, half_of(groups)).train()
    smaller(IMAGES).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in smaller.parameters())


def test_a_shared_weight_stays_shared():
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.one(x)) + torch.relu(self.two(x)))

    net, inputs = Twins(), torch.randn(4, 3)
    groups = find_groups(net, inputs)
    smaller = slim(net, groups, half_of(groups))
    assert smaller.one.weight is smaller.two.weight
    assert smaller.one.weight.shape == (4, 3)
    assert verify(net, groups, half_of(groups), inputs, tolerance=1e-6) <= 1e-6


class Counting(nn.Module):
    """The number of channels enters the result, as a factor or as a tensor."""

    def __init__(self, how: Callable[[int], int | Tensor]) -> None:
        super().__init__()
        self.conv, self.out, self.how = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.out(x * self.how(x.shape[1]))


@pytest.mark.parametrize(
    ("how", "reason"),
    [(int, r"a factor of \(8,\) that is now"), (torch.tensor, "the function changes with their number")],
)
def test_a_width_that_enters_the_result_protects(how: Callable[[int], int | Tensor], reason: str):
    assert re.search(reason, find_groups(Counting(how), IMAGES)[0].reason)


def test_verify_refuses_a_network_that_is_not_the_masked_one():
    net = Counting(int)
    groups = GroupBuilder(trace_channels(net, IMAGES)).gather()  # as if nobody had tried
    with pytest.raises(EquivalenceError, match="differs from the masked one"):
        verify(net, groups, half_of(groups), IMAGES, tolerance=1e-5)


def test_tensors_and_the_factory_rebuild_a_slim_network():
    net = built(nets.Grouped)
    groups = find_groups(net, IMAGES)
    smaller = slim(net, groups, half_of(groups))
    rebuilt = nets.Grouped().eval()
    resize_(rebuilt, smaller.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(IMAGES), smaller(IMAGES))
    assert str(rebuilt) == str(smaller)


@pytest.mark.parametrize(
    ("kept", "lesson"),
    [
        ({"nowhere": (0,)}, "no such group"),
        ({"stem.0": ()}, "keeps nothing"),
        ({"stem.0": (0, 8)}, r"8 channels \(0 to 7\)"),
        ({"stem.0": (-1, 3)}, "keeps channel -1"),
        ({"stem.0": (3, 1)}, "out of order"),
        ({"head.fc": (0, 1)}, "must stay whole: the model's output"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(kept: dict[str, tuple[int, ...]], lesson: str):
    net = built(nets.Residual)
    with pytest.raises(PlanError, match=lesson):
        slim(net, find_groups(net, IMAGES), Plan(kept))


def test_groups_of_another_network_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 5, 3)).eval()
    wide = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 5, 3)).eval()
    groups = find_groups(nn.Sequential(net), IMAGES)
    for cut in (slim, masked):
        with pytest.raises(PlanError, match="has no such tensor"):
            cut(net, groups, half_of(groups))
        with pytest.raises(PlanError, match="it has the shape"):
            cut(net, find_groups(wide, IMAGES), Plan({"0": (0, 1)}))


FAMILIES = {
    "resnet18": 0.99, "mobilenet_v2": 0.99, "vgg11_bn": 0.99, "densenet121": 0.99, "efficientnet_b0": 0.99,
    "shufflenet_v2_x1_0": 0.7,
}  # fmt: skip  # share of the channels, the classifier's outputs apart, that can be cut


@pytest.mark.parametrize("name", FAMILIES)
def test_the_families_of_torchvision_slim_exactly(name: str):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nets.randomise_(nets.family(name))
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    channels = map_channels(net, image)
    plan = half_of(channels.groups)
    assert verify(net, channels.groups, plan, image, tolerance=1e-5) <= 1e-5
    inside = [group for group in channels.groups if "output" not in group.reason]
    share = sum(g.width * g.span for g in inside if g.is_prunable) / sum(g.width * g.span for g in inside)
    assert share >= FAMILIES[name]
    assert channels.costs.of("macs", plan.widths()) < 0.5 * channels.costs.of("macs")
