"""Mask learning: the prompt, the hypernetwork, masks on weights, baselines, and the loop that trains them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.channels.allocation import Budget, choose_channels
from passdeploy.channels.groups import ChannelMap
from passdeploy.errors import RunError, TrainingError, UsageError
from passdeploy.grouping.find import map_channels
from passdeploy.models.prompt import Prompted, VisualPrompt, state_with_prompt
from passdeploy.sparsity.baselines import bn_scale_scores, magnitude_scores, random_scores, taylor_scores
from passdeploy.sparsity.hypernet import Hypernetwork, weight_statistics
from passdeploy.sparsity.learn import Learned, PassSettings, learn_masks
from passdeploy.sparsity.mask import batch_statistics_only
from passdeploy.sparsity.scorer import load_hypernetwork_
from tests import nets

IMAGE = torch.zeros(1, 3, 8, 8)


def stripes(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make images whose class is the colour channel that is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (batch,), generator=generator)
    images = 0.3 * torch.randn(batch, 3, 8, 8, generator=generator)
    images[torch.arange(batch), labels] += 1.0
    return images, labels


def stream() -> Iterator[tuple[Tensor, Tensor]]:
    return (stripes(32, seed) for seed in count())


class HalfUseless(nn.Module):
    """A network whose channels 0 to 5 copy the colours, and whose large channels 6 to 11 do not reach the output."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 12, 1)
        self.head = nn.Linear(12, 3)
        with torch.no_grad():
            self.features.weight.zero_()
            self.features.bias.zero_()
            self.head.weight.zero_()
            for channel in range(6):
                self.features.weight[channel, channel % 3] = 1.0
                self.head.weight[channel % 3, channel] = 3.0
            self.features.weight[6:] = 5.0  # large, so that magnitude would keep them

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


@pytest.fixture
def useless() -> tuple[nn.Module, ChannelMap]:
    net = HalfUseless().eval()
    return net, map_channels(net, IMAGE)


def learn(net: nn.Module, channels: ChannelMap, **settings: object) -> Learned:
    return learn_masks(
        net,
        channels.groups,
        stream,
        F.cross_entropy,
        costs=channels.costs,
        budget=Budget.of("macs", 0.5, channels.costs),
        settings=PassSettings(**{"steps": 12, "round_to": 1, "prompt_size": 1, "hidden": 8, "lr": 0.01, **settings}),
    )


@pytest.mark.parametrize("kind", ["lstm", "mlp", "conv"])
@pytest.mark.parametrize("prompt", ["padding", "full", "none"])
def test_channels_that_matter_win_though_they_are_small(useless: tuple[nn.Module, ChannelMap], kind: str, prompt: str):
    net, channels = useless
    scores = learn(net, channels, hypernet_kind=kind, prompt_kind=prompt).scores["features"]
    assert scores[:6].min() > scores[6:].max()
    assert magnitude_scores(net, channels.prunable)["features"][:6].max() < 1  # what magnitude would have cut


def test_learning_twice_gives_the_same_bits_and_leaves_no_trace(useless: tuple[nn.Module, ChannelMap]):
    net, channels = useless
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.random.get_rng_state()
    first, second = learn(net, channels), learn(net, channels)
    assert torch.equal(first.scores["features"], second.scores["features"])
    assert first.losses == second.losses
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("weights", ["trained", "frozen"])
def test_masks_are_learned_for_networks_in_half_precision(weights: str):
    net = HalfUseless().bfloat16().eval()
    batches = [(images.bfloat16(), labels) for images, labels in (stripes(32, 0), stripes(32, 1))]
    settings = PassSettings(steps=4, round_to=1, prompt_size=1, hidden=8, weights=weights)
    groups = map_channels(net, IMAGE.bfloat16()).groups
    learned = learn_masks(net, groups, batches, F.cross_entropy, settings=settings)
    assert learned.scores["features"][:6].min() > learned.scores["features"][6:].max()


def test_learning_moves_prompt_and_hypernetwork(useless: tuple[nn.Module, ChannelMap]):
    learned = learn(*useless)
    assert learned.prompt is not None
    assert learned.prompt.pixels().abs().max() > 0
    assert learned.hypernetwork.head_weight.abs().max() > 0
    assert learned.hypernetwork.encoder.layers[0].weight.grad.abs().max() > 0  # the prompt reaches the scores


def test_at_the_final_budget_learning_goes_on_to_lower_the_loss():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nets.randomise_(nets.SqueezeExcite())
        net.head.fc = nn.Linear(6, 3)
    channels = map_channels(net, IMAGE)
    losses = learn(net, channels, steps=60, lr=0.05).losses[30:]  # the budget has been met from here on
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_loss_that_is_not_a_number_stops_with_step_and_rate(useless: tuple[nn.Module, ChannelMap]):
    net, channels = useless
    with torch.no_grad():
        net.head.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 1 of mask learning, with a learning rate of 0.01"):
        learn(net, channels, prior_batches=0)
    with pytest.raises(TrainingError, match="the Taylor importance is not a number"):
        learn(net, channels)


def test_a_gradient_that_is_not_a_number_makes_no_plan(useless: tuple[nn.Module, ChannelMap]):
    """The loss is finite in every step, and weights that are frozen do not show it."""

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets) + (0 * output.sum()).sqrt()

    net, channels = useless
    settings = PassSettings(steps=3, round_to=1, hidden=8, prior_batches=0, weights="frozen", prompt_kind="none")
    with pytest.raises(TrainingError, match="a score is not a number at step 1 of mask learning"):
        learn_masks(net, channels.groups, stream, loss, costs=channels.costs, settings=settings)


@pytest.mark.parametrize("budget", [{"macs": 0.5, "params": 0.1}, {"flops": 0.5}, {"latency": 0.5}, {}])
def test_a_budget_is_of_one_kind_that_is_known(useless: tuple[nn.Module, ChannelMap], budget: dict[str, float]):
    net, channels = useless
    with pytest.raises(UsageError, match="needs exactly one of macs, params, channels"):
        learn_masks(net, channels.groups, stream, F.cross_entropy, costs=channels.costs, budget=budget)


def test_what_masks_cannot_be_learned_from_is_refused(useless: tuple[nn.Module, ChannelMap]):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batch = torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64)
    groups = map_channels(net, batch[0]).groups
    with pytest.raises(UsageError, match=r"a prompt is added to images .* these inputs are 2-d"):
        learn_masks(net, groups, [batch], F.cross_entropy)
    with pytest.raises(UsageError, match="no channel group can be pruned"):
        learn_masks(net, groups[-1:], [batch], F.cross_entropy)
    with pytest.raises(UsageError, match=r"a batch must be \(inputs, targets\)"):
        learn_masks(useless[0], useless[1].groups, [{"x": batch[0]}], F.cross_entropy, costs=useless[1].costs)


def test_weights_that_are_buffers_are_scored_like_parameters():
    net = HalfUseless().eval()
    channels = map_channels(net, IMAGE)
    expected = magnitude_scores(net, channels.prunable), weight_statistics(net, channels.prunable)
    for name in ("weight", "bias"):
        tensor = getattr(net.features, name).detach()
        delattr(net.features, name)
        net.features.register_buffer(name, tensor)
    found = magnitude_scores(net, channels.prunable), weight_statistics(net, channels.prunable)
    torch.testing.assert_close(found, expected)
    learned = learn(net, map_channels(net, IMAGE), steps=2)
    assert learned.scores["features"].isfinite().all()


def test_taylor_importance_is_the_squared_gradient_of_a_gate():
    net = HalfUseless().eval()
    channels = map_channels(net, IMAGE)
    images, labels = stripes(8, 0)
    gate = torch.ones(12, requires_grad=True)
    loss = F.cross_entropy(net.head(net.features(images).mean((2, 3)) * gate), labels)
    (gradient,) = torch.autograd.grad(loss, gate)
    scores = taylor_scores(net, channels.prunable, [(images, labels)], F.cross_entropy)
    torch.testing.assert_close(scores["features"], gradient.square())


def test_baselines_score_every_channel_of_every_group():
    net = nets.randomise_(nets.Depthwise())
    channels = map_channels(net, IMAGE)
    for scores in (
        random_scores(channels.prunable, seed=0),
        magnitude_scores(net, channels.prunable),
        bn_scale_scores(net, channels.prunable),
    ):
        assert {name: values.shape for name, values in scores.items()} == {
            group.name: (group.width,) for group in channels.prunable
        }
    assert torch.equal(
        random_scores(channels.prunable, seed=0)["stem.0"], random_scores(channels.prunable, seed=0)["stem.0"]
    )
    scale = bn_scale_scores(net, channels.prunable)["block.0.0"]
    by_hand = (net.block[0][1].weight.abs() + net.block[1][1].weight.abs()) / 2
    torch.testing.assert_close(scale, by_hand.detach())


def test_a_padding_prompt_touches_only_the_border():
    prompt = VisualPrompt("padding", (3, 8, 8), 2)
    nn.init.ones_(prompt.values)
    changed = prompt(torch.zeros(1, 3, 8, 8))[0, 0]
    assert changed[2:6, 2:6].abs().max() == 0
    assert changed.sum() == 64 - 16
    assert VisualPrompt("full", (3, 8, 8), 2)(torch.zeros(1, 3, 8, 8)).abs().max() == 0  # starts as nothing


def test_a_prompted_network_keeps_its_tensors_names():
    network = nets.Plain()
    prompt = VisualPrompt("full", (3, 16, 16), 1)
    nn.init.normal_(prompt.values)
    tensors = state_with_prompt(Prompted(prompt, network))
    assert set(tensors) == {*network.state_dict(), "passdeploy.prompt"}
    other = VisualPrompt("full", (3, 16, 16), 1)
    assert set(other.load_pixels_(tensors)) == set(network.state_dict())
    assert torch.equal(other.pixels(), prompt.pixels())


def test_a_layer_depends_on_the_layers_before_it_only_through_the_lstm():
    statistics = [torch.randn(4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for kind, is_connected in (("lstm", True), ("mlp", False)):
        net = Hypernetwork(statistics, torch.zeros(12), hidden=8, kind=kind, prompt_channels=None)
        nn.init.ones_(net.head_weight)
        net(None)[8:].sum().backward()  # the third group
        assert bool(net.embed_weight.grad[:4].abs().sum() > 0) is is_connected


def test_an_untrained_hypernetwork_returns_its_prior():
    prior = torch.tensor([-1.0, 2.0, 0.5, 0.0, 3.0])
    net = Hypernetwork([torch.zeros(2), torch.zeros(3)], prior, hidden=4)
    assert torch.equal(net(torch.zeros(1, 3, 8, 8)), prior)


@pytest.mark.parametrize("kind", ["lstm", "mlp", "conv", "none"])
def test_a_hypernetwork_saved_layer_by_layer_gives_the_scores_it_gave(kind: str):
    """Compare with what was once computed group by group, from linear layers and an LSTM cell."""
    draws, widths, hidden = torch.Generator().manual_seed(0), (2, 4, 3), 5
    statistics = [torch.randn(width, generator=draws) for width in widths]
    net = Hypernetwork(statistics, torch.zeros(9), hidden=hidden, kind=kind)
    mix = {"mlp": nn.Linear(hidden, hidden), "conv": nn.Conv1d(hidden, hidden, 3, padding=1)}.get(kind)
    cell = nn.LSTMCell(hidden, hidden)
    embed = nn.ModuleList(nn.Linear(width, hidden) for width in widths)
    heads = nn.ModuleList(nn.Linear(1 if kind == "none" else hidden, width) for width in widths)
    parts = {"heads": heads} | ({} if kind == "none" else {"embed": embed})
    parts |= {"cell": cell} if kind == "lstm" else {"mix": mix} if mix else {}
    saved = {name: tensor.detach() for name, tensor in nn.ModuleDict(parts).state_dict().items()}
    saved |= {f"encoder.{name}": tensor for name, tensor in (net.encoder.state_dict() if net.encoder else {}).items()}
    prior = [torch.randn(width, generator=draws) for width in widths]
    saved |= {f"prior{number}": values for number, values in enumerate(prior)}
    saved |= {f"statistics{number}": torch.zeros(width) for number, width in enumerate(widths)}
    load_hypernetwork_(net, saved)

    prompt = torch.randn(1, 3, 8, 8, generator=draws)
    if kind == "none":
        expected = [head.bias + values for head, values in zip(heads, prior, strict=True)]
    else:
        inputs = [layer(values)[None] for layer, values in zip(embed, statistics, strict=True)]
        start = net.encoder(prompt)
        states, memory = [], torch.zeros(1, hidden)
        for one in inputs:
            state, memory = cell(one, (states[-1] if states else start, memory))
            states.append(state)
        if mix is not None:
            sequence = torch.cat(inputs) + start
            states = torch.tanh(mix(sequence) if kind == "mlp" else mix(sequence.T[None])[0].T).split(1)
        expected = [head(state)[0] + values for head, state, values in zip(heads, states, prior, strict=True)]
    torch.testing.assert_close(net(prompt), torch.cat(expected))


def test_a_hypernetwork_of_other_groups_is_refused():
    nets_of_widths = [
        Hypernetwork([torch.zeros(w) for w in widths], torch.zeros(5), hidden=4) for widths in ((2, 3), (3, 2))
    ]
    with pytest.raises(RunError, match=r"does not fit: 1 tensors differ \(first 'widths'\)"):
        load_hypernetwork_(nets_of_widths[0], nets_of_widths[1].state_dict())
    other = Hypernetwork([torch.zeros(2), torch.zeros(3)], torch.zeros(5), hidden=4, kind="mlp")
    with pytest.raises(RunError, match="does not fit"):
        load_hypernetwork_(nets_of_widths[0], other.state_dict())


def test_learning_uses_and_never_stores_batch_statistics():
    net = nets.randomise_(nets.Residual())
    evaluated = batch_statistics_only(net)
    images = 10 + torch.randn(4, 3, 8, 8)
    before = net.stem[1].running_mean.clone()
    shifted = evaluated(images)
    assert torch.equal(net.stem[1].running_mean, before)
    assert torch.equal(evaluated.stem[1].running_mean, before)
    assert not torch.allclose(shifted, net(images))
    assert evaluated.stem[0].weight is net.stem[0].weight


def test_scores_become_a_plan_within_the_budget(useless: tuple[nn.Module, ChannelMap]):
    net, channels = useless
    budget = Budget.of("macs", 0.5, channels.costs)
    plan = choose_channels(learn(net, channels).scores, channels.groups, channels.costs, budget, round_to=1)
    assert plan.kept["features"] == (0, 1, 2, 3, 4, 5)
