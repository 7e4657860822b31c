"""From a recipe's `prune` section to a plan: PASS, a baseline, or what another run found."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.channels.allocation import Budget, choose_channels
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.models.prompt import VisualPrompt
from passdeploy.runtime.distributed import SINGLE_PROCESS, Processes
from passdeploy.runtime.events import Stage
from passdeploy.sparsity.baselines import bn_scale_scores, magnitude_scores, random_scores, taylor_scores
from passdeploy.sparsity.growing import grow_penalty
from passdeploy.sparsity.hypernet import Hypernetwork
from passdeploy.sparsity.learn import PassSettings, learn_masks
from passdeploy.training.losses import DistillationLoss, logits_of

if TYPE_CHECKING:
    from passdeploy.recipe import Recipe

Stream = Callable[[], Iterator[tuple[Tensor, Tensor]]]  # starts the same batches every time, without end


@dataclass(frozen=True)
class Selection:
    """The channels that stay, and what else was learned with them."""

    plan: Plan
    scores: dict[str, Tensor]  # group name -> (width,); 1 and 0 where a plan was taken over
    text: str
    prompt: VisualPrompt | None = None
    hypernetwork: Hypernetwork | None = None
    weights: nn.Module | None = None  # where choosing trained them: PASS that keeps its copy, growing


@dataclass(frozen=True)
class ReusedRun:
    """What is taken over from another run."""

    plan: Plan | None = None
    hypernetwork: dict[str, Tensor] | None = None


def choose(
    recipe: Recipe,
    channels: ChannelMap,
    budget: Budget,
    round_to: int,
    dense: nn.Module,
    stream: Stream,
    *,
    stage: Stage,
    processes: Processes = SINGLE_PROCESS,
    reused: ReusedRun | None = None,
) -> Selection:
    """Choose as `recipe.prune` says.

    Args:
        recipe: of the run.
        channels: of `dense`.
        budget: what the slim network may cost.
        round_to: widths become multiples of this.
        dense: the trained network, on its device; it is left as it was.
        stream: training batches on that device.
        stage: told about every step.
        processes: that choose together.
        source: taken over from another run, where the recipe names one.
    """
    prune, groups = recipe.prune, channels.prunable
    reused = reused or ReusedRun()
    if reused.plan is not None:
        scores = {group.name: _as_mask(reused.plan, group.name, group.width) for group in groups}
        return Selection(reused.plan, scores, f"{len(groups)} groups as in {prune.from_run}")
    dense = copy.deepcopy(dense)
    if recipe.train.channels_last:
        dense = dense.to(memory_format=torch.channels_last)
    allocation = prune.allocation
    if allocation == "auto":
        allocation = "uniform" if prune.method == "uniform" else "global"
    text = f"{len(groups)} groups scored by {prune.method}"
    weights_optimizer = recipe.finetune.optimizer
    if prune.weights_lr is not None:
        weights_optimizer = weights_optimizer.model_copy(update={"lr": prune.weights_lr})
    if prune.method == "pass":
        settings = PassSettings(
            steps=prune.steps, lr=prune.optimizer.lr, weight_decay=prune.optimizer.weight_decay,
            optimizer=prune.optimizer.name, momentum=prune.optimizer.momentum, anneal=prune.anneal,
            prompt_kind=prune.prompt.kind, prompt_size=prune.prompt.size, hypernet_kind=prune.hypernet.kind,
            hidden=prune.hypernet.hidden, distill=prune.distill.alpha if prune.distill else 0.0,
            temperature=prune.distill.temperature if prune.distill else 1.0,
            only_better=bool(prune.distill and prune.distill.only_better),
            round_to=round_to, per_cost=prune.per_cost, allocation=allocation,
            weights=prune.weights, weights_optimizer=weights_optimizer, seed=recipe.seed,
        )  # fmt: skip
        learned = learn_masks(
            dense, groups, stream, _cross_entropy, costs=channels.costs, budget=budget, settings=settings,
            start=reused.hypernetwork, stage=stage, processes=processes,
        )  # fmt: skip
        return Selection(
            learned.plan, learned.scores, text, learned.prompt, learned.hypernetwork,
            None if learned.weights is None else learned.weights.to(memory_format=torch.contiguous_format),
        )  # fmt: skip
    scores = _baseline(recipe, channels, dense, stream, processes)
    plan = choose_channels(
        scores, groups, channels.costs, budget, round_to=round_to, per_cost=prune.per_cost, allocation=allocation
    )
    if prune.method != "growing":
        return Selection(plan, scores, text)
    asked = prune.distill
    grown = grow_penalty(
        dense, groups, plan, stream(), _cross_entropy, steps=prune.steps, lr=weights_optimizer.lr,
        ceiling=prune.growing.ceiling, ramp=prune.growing.ramp,
        distillation=(
            DistillationLoss(dense.eval(), asked.alpha, asked.temperature, asked.only_better) if asked else None
        ),
        stage=stage, processes=processes,
    )  # fmt: skip
    return Selection(plan, scores, text, weights=grown)


def _baseline(
    recipe: Recipe, channels: ChannelMap, dense: nn.Module, stream: Stream, processes: Processes
) -> dict[str, Tensor]:
    prune, groups = recipe.prune, channels.prunable
    if prune.method == "random":
        return random_scores(groups, seed=recipe.seed)
    if prune.method == "bn_scale":
        return bn_scale_scores(dense, groups)
    score = {"taylor": "taylor", "growing": prune.growing.score}.get(prune.method, prune.norm)
    if score == "taylor":
        batches = islice(stream(), PassSettings.prior_batches)
        return taylor_scores(dense, groups, batches, _cross_entropy, processes=processes)
    return magnitude_scores(dense, groups, norm=score)


def _cross_entropy(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(output), labels)


def _as_mask(plan: Plan, name: str, width: int) -> Tensor:
    mask = torch.zeros(width)
    mask[list(plan.kept.get(name, range(width)))] = 1.0
    return mask
