"""Growing regularisation, the settings of mask learning, and masks under layer norms."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.channels.allocation import Budget
from passdeploy.channels.plan import Plan
from passdeploy.errors import DataError, TrainingError
from passdeploy.grouping.find import map_channels
from passdeploy.recipe import OptimizerSpec
from passdeploy.slimming.masked import masked
from passdeploy.sparsity import shrinking
from passdeploy.sparsity.baselines import magnitude_scores
from passdeploy.sparsity.growing import grow_penalty
from passdeploy.sparsity.learn import PassSettings, learn_masks
from passdeploy.sparsity.objective import MaskObjective
from passdeploy.sparsity.shrinking import ShrinkingNetwork
from passdeploy.training.losses import DistillationLoss
from tests import nets
from tests.sparsity.test_learn import IMAGE, HalfUseless, stripes

BATCHES = [stripes(32, seed) for seed in range(4)]
SETTINGS = {"steps": 8, "round_to": 1, "prompt_size": 1, "hidden": 8, "lr": 0.01}


class Teacher(HalfUseless):
    """A teacher that records the batch size of every forward pass of its newest instance or of copies of that."""

    batch_sizes: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.batch_sizes.clear()

    def forward(self, x: Tensor) -> Tensor:
        self.batch_sizes.append(len(x))
        return super().forward(x)


def test_removed_channels_shrink_and_kept_ones_do_not():
    net = HalfUseless()
    plan = Plan({"features": tuple(range(6))})
    groups = map_channels(net, IMAGE).groups
    # the four batches are walked again and again
    grown = grow_penalty(net, groups, plan, BATCHES, F.cross_entropy, steps=60, optimizer=OptimizerSpec(lr=0.05))
    removed, kept = (
        (grown.features.weight[part].norm() / net.features.weight[part].norm()).item()
        for part in (slice(6, 12), slice(0, 6))
    )
    assert removed < 0.2
    assert kept > 0.7
    assert net.features.weight[6:].eq(5.0).all()  # the network itself is left as it was


def test_growing_takes_the_optimizer_that_it_is_given():
    """AdamW moves every weight by about its rate in the first step, whatever the gradient; SGD does not."""
    net = HalfUseless()
    spec = OptimizerSpec(name="adamw", lr=0.001, weight_decay=0.0)
    grown = grow_penalty(
        net, map_channels(net, IMAGE).groups, Plan({}), BATCHES, F.cross_entropy, steps=1, optimizer=spec
    )
    moved = (grown.features.weight - net.features.weight).abs()
    torch.testing.assert_close(moved[moved > 0].median(), torch.tensor(0.001), rtol=0.05, atol=0.0)


def test_growing_stops_at_a_loss_that_is_not_a_number():
    net = HalfUseless()
    nn.init.constant_(net.head.bias, float("nan"))
    with pytest.raises(TrainingError, match=r"step 1 of growing regularisation, with a learning rate of 0\.05"):
        grow_penalty(net, (), Plan({}), BATCHES, F.cross_entropy, steps=4, optimizer=OptimizerSpec(lr=0.05))


def test_growing_stops_at_weights_that_are_not_finite_after_the_last_step():
    def steep(output: Tensor, targets: Tensor) -> Tensor:
        return 1e10 * F.cross_entropy(output, targets)

    with pytest.raises(TrainingError, match="a weight is not a number at step 1 of growing"):
        grow_penalty(HalfUseless(), (), Plan({}), BATCHES, steep, steps=1, optimizer=OptimizerSpec(lr=1e38))


def test_with_alpha_one_only_the_teacher_counts_in_growing():
    net, teacher = HalfUseless().eval(), Teacher().eval()

    def steep(output: Tensor, labels: Tensor) -> Tensor:
        return 1000 * F.cross_entropy(output, labels)

    whole, groups = Plan({"features": tuple(range(12))}), map_channels(net, IMAGE).groups
    moved = [
        max((own - dense).abs().max().item() for own, dense in zip(grown.parameters(), net.parameters(), strict=True))
        for distillation in (DistillationLoss(teacher, alpha=1.0), None)
        for grown in [
            grow_penalty(
                net, groups, whole, BATCHES, steep, steps=4, optimizer=OptimizerSpec(lr=0.01), distillation=distillation
            )
        ]
    ]
    assert teacher.batch_sizes == [32] * 4
    assert moved[0] < 0.1 < moved[1]  # no channel is removed and the teacher is the network; labels have no weight


def test_l2_is_the_norm_of_the_filters_over_their_mean():
    net = HalfUseless()
    weight = net.features.weight.detach().flatten(1)
    scores = magnitude_scores(net, map_channels(net, IMAGE).prunable, norm="l2")["features"]
    torch.testing.assert_close(scores, weight.norm(dim=1) / weight.norm(dim=1).mean())


def test_free_scores_learn_without_a_hypernetwork():
    net = HalfUseless().eval()
    groups = map_channels(net, IMAGE).groups
    settings = PassSettings(**SETTINGS, hypernet_kind="none")
    learned = learn_masks(net, groups, BATCHES, F.cross_entropy, settings=settings)
    assert [name for name, _ in learned.hypernetwork.named_parameters()] == ["head_bias"]
    assert learned.hypernetwork.head_bias.abs().max() > 0
    assert learned.plan.kept["features"] == tuple(range(6))  # half the multiply-adds, which is the default


def test_batches_that_can_be_walked_only_once_are_refused():
    net = HalfUseless().eval()
    groups = map_channels(net, IMAGE).groups
    with pytest.raises(DataError, match="only once"):
        learn_masks(net, groups, iter(BATCHES), F.cross_entropy, settings=PassSettings(**SETTINGS))
    with pytest.raises(DataError, match="no batch"):
        learn_masks(net, groups, [], F.cross_entropy, settings=PassSettings(**SETTINGS))


def test_distillation_enters_the_loss_with_its_weight():
    net = HalfUseless().eval()
    channels = map_channels(net, IMAGE)
    images, labels = BATCHES[0]
    losses = [objective_of(net, channels, distill=alpha).loss(None, (images, labels)) for alpha in (0.0, 1.0)]
    torch.testing.assert_close(losses[0], F.cross_entropy(net(images), labels))
    assert losses[1].item() == pytest.approx(0.0, abs=1e-6)  # everything is kept: the same logits
    worse = copy.deepcopy(net)
    worse.head.weight.data.neg_()
    objective = objective_of(net, channels, worse, distill=1.0, only_better=True)  # worse on every image
    torch.testing.assert_close(objective.loss(None, (images, labels)), losses[0])


def test_a_given_teacher_is_used_instead_of_the_network():
    net, teacher = HalfUseless().eval(), Teacher()
    settings = PassSettings(**SETTINGS, distill=0.5)
    learn_masks(net, map_channels(net, IMAGE).groups, BATCHES, F.cross_entropy, settings=settings, teacher=teacher)
    assert teacher.batch_sizes == [32] * 8  # once a step


class Normed(nn.Module):
    """A network with a layer norm over prunable channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.out = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.stem(x).mean((2, 3))))


def test_masked_layer_norms_use_the_kept_channels_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shrinking, "SLACK", 1.0)  # the network is masked and not slimmed
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Normed().eval()
    channels = map_channels(net, IMAGE)
    images, labels = BATCHES[0]
    objective = objective_of(net, channels)
    plan = objective.plan(torch.linspace(0.9, 0.1, 8), channels.costs.of("macs") // 2)
    assert not objective.network.shrink_(plan)
    loss = objective.loss(None, (images, labels))
    reference = masked(net, channels.groups, plan)
    torch.testing.assert_close(loss, F.cross_entropy(reference(images), labels))


def test_layer_norms_are_restricted_from_the_step_on_in_which_their_channels_are_masked(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(shrinking, "SLACK", 1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), Normed().eval()).eval()
        net[2].stem = nn.Conv2d(6, 8, 1)
    channels = map_channels(net, IMAGE)
    network = ShrinkingNetwork(net, channels.prunable, channels.costs, None)
    for plan in (Plan({"0": (1, 3, 5)}), Plan({"0": (1, 5), "2.stem": (0, 3, 4)})):
        assert not network.shrink_(plan)
        reference = masked(net, channels.groups, plan)
        torch.testing.assert_close(network.run(BATCHES[0][0]), reference(BATCHES[0][0]))


def objective_of(net: nn.Module, channels, teacher: nn.Module | None = None, **settings: float) -> MaskObjective:
    budget = Budget.of("macs", 0.5, channels.costs)
    return MaskObjective(
        net,
        channels.prunable,
        F.cross_entropy,
        channels.costs,
        budget,
        PassSettings(round_to=1, **settings),
        teacher or net,
    )


def test_uniform_allocation_cuts_every_group_alike():
    net = nets.randomise_(nets.Residual())
    net.head.fc = nn.Linear(8, 3)
    channels = map_channels(net, IMAGE)
    settings = PassSettings(**SETTINGS, allocation="uniform", per_cost=False)
    learned = learn_masks(net, channels.groups, BATCHES, F.cross_entropy, costs=channels.costs, settings=settings)
    shares = [len(learned.plan.kept[group.name]) / group.width for group in channels.prunable]
    assert max(shares) - min(shares) < 0.2
