"""Channel selection as a recipe's `prune` section says: by PASS, by a baseline, or as in another run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.channels.allocation import Budget, choose_channels
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.models.cloning import deep_copy
from passdeploy.models.prompt import VisualPrompt
from passdeploy.runtime.distributed import SINGLE_PROCESS, Processes
from passdeploy.runtime.events import Stage
from passdeploy.sparsity.baselines import (
    bn_scale_scores,
    magnitude_scores,
    random_scores,
    taylor_scores,
    with_block_sums,
)
from passdeploy.sparsity.batches import SeekableBatches
from passdeploy.sparsity.growing import grow_penalty
from passdeploy.sparsity.hypernet import Hypernetwork
from passdeploy.sparsity.learn import Learned, learn_masks
from passdeploy.sparsity.settings import PassSettings, allocation_of, weights_optimizer_of
from passdeploy.training.losses import DistillationLoss, logits_of
from passdeploy.training.saving import Checkpoint

if TYPE_CHECKING:
    from passdeploy.recipe import Recipe


@dataclass(frozen=True)
class Selection:
    """Channels to keep, and the modules that were trained while they were selected."""

    plan: Plan
    # Group name -> (width,), `presence` of a block -> (1,); 1 and 0 where the plan is that of another run.
    scores: dict[str, Tensor]
    text: str  # one line for the person who waits
    prompt: VisualPrompt | None = None
    hypernetwork: Hypernetwork | None = None
    weights: nn.Module | None = None  # of PASS that keeps its co-trained copy, and of growing regularisation
    steps_before: int = 0  # of mask learning in another run, from whose snapshot this comes


@dataclass(frozen=True)
class ReusedRun:
    """Parts of another run that replace selection, or that it starts from."""

    plan: Plan | None = None
    hypernetwork: dict[str, Tensor] | None = None
    snapshot: Selection | None = None  # what its mask learning had when its budget passed this run's
    dense: dict[str, Tensor] | None = None  # the weights that the snapshot was learned from


def select_channels(
    recipe: Recipe,
    channels: ChannelMap,
    budget: Budget,
    round_to: int,
    dense: nn.Module,
    stream: SeekableBatches,
    *,
    stage: Stage,
    processes: Processes = SINGLE_PROCESS,
    reused: ReusedRun | None = None,
    checkpoint: Checkpoint | None = None,
    larger_budgets: Sequence[Budget] = (),
    on_larger_budget: Callable[[Budget, int, Selection], None] | None = None,
) -> Selection:
    """Select the channels to keep as `recipe.prune` says.

    Args:
        recipe: of the run.
        channels: of `dense`.
        budget: cost limit of the slim network.
        round_to: widths become multiples of this.
        dense: the trained network, on its device; it is left as it was.
        stream: training batches on that device.
        stage: hears of every step.
        processes: that select together, each with its part of every batch.
        reused: parts of another run, where the recipe names one.
        checkpoint: that learning and growing go on from.
        larger_budgets: that the shrinking budget of mask learning passes on its way.
        on_larger_budget: called when it is about to pass one, with that budget, the steps that were made, and what
            would be selected for it now.
    """
    prune, groups = recipe.prune, channels.prunable
    reused = reused or ReusedRun()
    if reused.snapshot is not None:
        return reused.snapshot
    if reused.plan is not None:
        scores = {group.name: _as_mask(reused.plan, group.name, group.width) for group in groups}
        return Selection(reused.plan, scores, f"{len(groups)} groups as in {prune.from_run}")
    dense = deep_copy(dense)
    if recipe.finetune.channels_last:
        dense = dense.to(memory_format=torch.channels_last)
    text = f"{len(groups)} groups scored by {prune.method}"
    if blocks := channels.costs.blocks:
        text = f"{len(groups)} groups and {len(blocks)} blocks scored by {prune.method}"
    if prune.method == "pass":

        def pass_on(larger: Budget, learned: Learned) -> None:
            if on_larger_budget is not None:
                on_larger_budget(larger, len(learned.losses), _selection(learned, text))

        learned = learn_masks(
            dense,
            groups,
            stream,
            _cross_entropy,
            costs=channels.costs,
            budget=budget,
            larger_budgets=larger_budgets,
            on_larger_budget=pass_on,
            settings=PassSettings.from_recipe(recipe, round_to=round_to),
            start=reused.hypernetwork,
            stage=stage,
            processes=processes,
            checkpoint=checkpoint,
        )
        return _selection(learned, text)
    scores = _baseline_scores(recipe, channels, dense, stream, processes)
    plan = choose_channels(
        scores,
        groups,
        channels.costs,
        budget,
        round_to=round_to,
        per_cost=prune.per_cost,
        allocation=allocation_of(prune),
    )
    if prune.method != "growing":
        return Selection(plan, scores, text)
    grown = grow_penalty(
        dense,
        groups,
        plan,
        stream,
        _cross_entropy,
        steps=prune.steps,
        optimizer=weights_optimizer_of(recipe),
        ceiling=prune.growing.ceiling,
        ramp=prune.growing.ramp,
        distillation=_growing_distillation(recipe, dense),
        blocks=channels.blocks,
        seed=recipe.seed,
        stage=stage,
        processes=processes,
        checkpoint=checkpoint,
    )
    return Selection(plan, scores, text, weights=grown)


def _selection(learned: Learned, text: str) -> Selection:
    """Make a selection of what was learned; its weights are in the memory order of files."""
    weights = None if learned.weights is None else learned.weights.to(memory_format=torch.contiguous_format)
    return Selection(learned.plan, learned.scores, text, learned.prompt, learned.hypernetwork, weights)


def _growing_distillation(recipe: Recipe, dense: nn.Module) -> DistillationLoss | None:
    """Put `dense` into evaluation mode and make it the teacher of growing regularisation; None without distillation."""
    spec = recipe.prune.distill
    return DistillationLoss(dense.eval(), spec.alpha, spec.temperature, spec.only_better) if spec else None


def _baseline_scores(
    recipe: Recipe, channels: ChannelMap, dense: nn.Module, stream: SeekableBatches, processes: Processes
) -> dict[str, Tensor]:
    """Score the channels as the recipe's baseline does; growing regularisation chooses by such scores too."""
    prune, groups, blocks = recipe.prune, channels.prunable, channels.costs.blocks
    if prune.method == "random":
        return with_block_sums(random_scores(groups, seed=recipe.seed), blocks)
    if prune.method == "bn_scale":
        return with_block_sums(bn_scale_scores(dense, groups), blocks)
    score = {"taylor": "taylor", "growing": prune.growing.score}.get(prune.method, prune.norm)
    if score == "taylor":
        batches = islice(stream(), PassSettings.prior_batches)
        return taylor_scores(dense, groups, batches, _cross_entropy, blocks=blocks, processes=processes)
    return with_block_sums(magnitude_scores(dense, groups, norm=score), blocks)


def _cross_entropy(output: Any, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy of a network's output."""
    return F.cross_entropy(logits_of(output), labels)


def _as_mask(plan: Plan, name: str, width: int) -> Tensor:
    """Write a group's kept channels as 1 and its removed ones as 0, shape (width,)."""
    mask = torch.zeros(width)
    mask[list(plan.kept.get(name, range(width)))] = 1.0
    return mask
