"""Preparation of a recipe: load its data and network, find the channel groups and check the budget, before training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.channels.allocation import Budget, in_units, require_below_dense, smallest_plan
from passdeploy.channels.groups import ChannelMap
from passdeploy.commands.published import with_published_input
from passdeploy.commands.rebuildable import require_rebuildable
from passdeploy.commands.reuse import read_reused_run
from passdeploy.commands.try_training import try_training
from passdeploy.data.splits import ImageData, load_data
from passdeploy.errors import DataError, UsageError
from passdeploy.grouping.find import map_channels
from passdeploy.latency.target import LatencyTarget, prepare_target
from passdeploy.models.build import build_model, comes_trained
from passdeploy.models.diagnosis import image_errors, require_own_weights
from passdeploy.recipe import Recipe
from passdeploy.runtime.distributed import SINGLE_PROCESS, Processes
from passdeploy.runtime.events import Listener, silent
from passdeploy.sparsity.select import ReusedRun
from passdeploy.training.losses import logits_of


@dataclass(frozen=True)
class Prepared:
    """A recipe with everything that it names loaded and checked, before any training."""

    recipe: Recipe
    data: ImageData
    dense: nn.Module  # on the CPU; not yet trained, or with an untrained head, unless `is_trained`
    channels: ChannelMap
    budget: Budget
    round_to: int
    target: LatencyTarget | None = None  # None if the budget is not a latency
    reused: ReusedRun | None = None  # parts of the run that `prune.from_run` names

    @property
    def image(self) -> Tensor:
        """An example input of zeros, shape (1, 3, height, width)."""
        return torch.zeros(1, *self.data.image_shape)

    @property
    def is_trained(self) -> bool:
        """True if the weights were trained on these classes; otherwise the run trains the dense network first."""
        return _comes_trained(self.recipe, self.data) or (self.reused is not None and self.reused.dense is not None)

    @property
    def larger_budgets(self) -> dict[float, Budget]:
        """The budgets that the shrinking one passes (`prune.targets`), by their share of the dense cost."""
        kind = self.budget.kind
        return {share: Budget.of(kind, share, self.channels.costs) for share in self.recipe.prune.larger_targets}

    @property
    def text(self) -> str:
        """A line that names the model, the number of images and classes, and the groups that can be cut."""
        prunable, groups = self.channels.prunable, self.channels.groups
        per_class = f" ({self.data.contents.per_class})" if self.data.contents else ""
        return (
            f"{self.recipe.model.name}, {len(self.data.train):,} + {len(self.data.test):,} images of "
            f"{self.data.num_classes} classes{per_class}, {len(prunable)} of {len(groups)} channel groups can be cut"
        )


def build_dense(
    recipe: Recipe, num_classes: int, *, allow_code: bool = False, listener: Listener | None = None
) -> nn.Module:
    """Build the dense network that a recipe names, with its weights, for `num_classes` classes."""
    return build_model(
        recipe.model.name,
        num_classes=num_classes,
        weights=recipe.model.weights,
        new_head=recipe.model.new_head,
        allow_code=allow_code,
        seed=recipe.seed,
        listener=listener,
    )


def prepare(
    recipe: Recipe,
    *,
    device: str = "auto",
    allow_code: bool = False,
    listener: Listener = silent,
    processes: Processes = SINGLE_PROCESS,
) -> Prepared:
    """Load the data and the network of a recipe, find the channel groups and check that the budget can be met.

    For a latency target it also finds the network's latency table, which is measured unless it is in the cache: on
    `device`, unless the recipe names another. Of several processes the first one measures it, for all of them, since
    they have to make the same plans.
    """
    recipe = with_published_input(recipe)
    data = load_data(recipe.data)
    counted = recipe.prune.counted(len(data.train), recipe.data.batch_size)
    recipe = recipe.model_copy(update={"prune": counted})
    dense = build_dense(recipe, data.num_classes, allow_code=allow_code, listener=listener)
    require_own_weights(dense, recipe.model.name)
    image = torch.zeros(1, *data.image_shape)
    logits = logits_of(_run_on_image(dense, image, recipe))
    if logits.shape != (1, data.num_classes):
        raise DataError(
            f"{recipe.model.name} answers with shape {tuple(logits.shape)}, but the data has {data.num_classes} "
            "classes.\nA classifier must give one score for each class."
        )
    require_rebuildable(dense, recipe, image=image, num_classes=data.num_classes, allow_code=allow_code)
    try_training(dense, recipe, data, is_trained=_comes_trained(recipe, data), device=device, listener=listener)
    with_blocks = recipe.prune.skips_blocks or recipe.prune.takes_plan  # a plan that is taken over may skip some
    channels = map_channels(
        dense,
        image,
        include=recipe.prune.include,
        exclude=recipe.prune.exclude,
        with_blocks=with_blocks,
    )
    if not with_blocks:
        channels = replace(channels, costs=channels.costs.without_blocks())
    channels.require_prunable(recipe.model.name)
    target = None
    if recipe.prune.target.kind in ("latency", "latency_ms"):
        found = channels
        target = processes.first_only(
            lambda: prepare_target(recipe.prune, dense, found, data.image_shape, device=device, listener=listener)
        )
        channels, budget, round_to = target.channels, target.budget, target.round_to
    else:
        budget = Budget.of(recipe.prune.target.kind, recipe.prune.target.value, channels.costs)
        round_to = 8 if recipe.prune.round_to == "auto" else int(recipe.prune.round_to)
    if not recipe.prune.takes_plan:
        smallest_plan(channels.prunable, channels.costs, budget, round_to=round_to)
        if target is None:
            require_below_dense(budget, channels.costs)
            _require_other_targets(recipe, channels, budget)
    reused = read_reused_run(recipe, channels, dense) if recipe.prune.from_run is not None else None
    return Prepared(recipe, data, dense, channels, budget, round_to, target, reused)


def _require_other_targets(recipe: Recipe, channels: ChannelMap, budget: Budget) -> None:
    """Raise a UsageError where a larger one of `prune.targets` is the same number as the smallest."""
    for share in recipe.prune.larger_targets:
        if Budget.of(budget.kind, share, channels.costs).limit == budget.limit:
            same = in_units(budget.kind, budget.limit)
            raise UsageError(
                f"prune.targets: {share} and {recipe.prune.target.value} are the same {same}.\nLeave one of them out."
            )


def _comes_trained(recipe: Recipe, data: ImageData) -> bool:
    model = recipe.model
    return comes_trained(model.name, num_classes=data.num_classes, weights=model.weights, new_head=model.new_head)


def _run_on_image(model: nn.Module, image: Tensor, recipe: Recipe) -> Any:
    advice = "Set data.image_size to what the network was made for."
    with image_errors(model, recipe.model.name, recipe.data.image_size, advice=advice), torch.no_grad():
        return model.eval()(image)
