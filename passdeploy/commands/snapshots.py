"""Snapshots of mask learning: what it had when its shrinking budget passed a larger one (`prune.targets`).

A run that learns for the smallest of several budgets writes one for each of the others, and the runs of those budgets
go on from it: each holds plan, scores, prompt and weights, and how much of mask learning was still to come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from passdeploy.channels.allocation import Budget
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.errors import RunError, percent
from passdeploy.models.cloning import deep_copy
from passdeploy.models.prompt import PROMPT_KEY, VisualPrompt
from passdeploy.recipe import parse_recipe
from passdeploy.runs.folder import RunFolder
from passdeploy.sparsity.select import Selection
from passdeploy.training.saving import named, prefixed

if TYPE_CHECKING:
    from passdeploy.recipe import Recipe

_SAME_DATA = ("name", "root", "train_folder", "test_folder", "image_size", "preprocessing")


@dataclass(frozen=True)
class SnapshotWriter:
    """Writes the snapshots of a run while its masks are learned.

    Args:
        folder: of the run.
        budgets: the larger budgets, by their share of the dense cost.
        steps: of mask learning in all.
        images_per_step: of mask learning.
        images: training images.
    """

    folder: RunFolder
    budgets: Mapping[float, Budget]
    steps: int
    images_per_step: int
    images: int

    def write(self, budget: Budget, step: int, selection: Selection) -> None:
        """Write the snapshot of a budget, taken after `step` steps; one that is there is replaced."""
        tensors = prefixed("scores", selection.scores)
        if selection.prompt is not None:
            tensors[PROMPT_KEY] = selection.prompt.pixels().detach()
        if selection.weights is not None:
            tensors |= prefixed("weights", selection.weights.state_dict())
        left = (self.steps - step) * self.images_per_step / self.images
        facts = {"step": step, "steps": self.steps, "epochs_left": left, "plan": selection.plan.to_json()}
        for share in (share for share, larger in self.budgets.items() if larger == budget):
            self.folder.write_tensors(_file(share, "safetensors"), tensors, kind="snapshot")
            self.folder.write_json(_file(share, "json"), facts, kind="snapshot")


def epochs_left(folder: RunFolder, share: float) -> float:
    """Return how many passes over the training images mask learning still made after a snapshot."""
    return float(_facts(folder, share)["epochs_left"])


def read_snapshot(folder: RunFolder, recipe: Recipe, channels: ChannelMap, dense: nn.Module) -> Selection:
    """Read the snapshot for the target of a recipe.

    Args:
        folder: of the run that wrote it.
        recipe: of the run that goes on from it.
        channels: of the network.
        dense: the network, with any weights; it is left as it was.

    Raises:
        RunError: that run has none for this target, or is of another network or other data.
        PlanError: the plan does not fit this network.
    """
    source = parse_recipe(folder.read_text("recipe.resolved.yaml"), "recipe.resolved.yaml")
    differing = [f"data.{key}" for key in _SAME_DATA if getattr(source.data, key) != getattr(recipe.data, key)]
    if source.model != recipe.model:
        differing.insert(0, "model")
    if differing:
        raise RunError(
            f"prune.reuse is snapshot, but {folder.path} was made with another {' and '.join(differing)}.\n"
            "Weights that were learned there belong to that network and those images: use the same, or reuse its plan."
        )
    target = recipe.prune.target
    facts = _facts(folder, float(target.value) if target.kind == source.prune.target.kind else None)
    plan = Plan.from_json(facts["plan"])
    plan.check(channels.groups, channels.blocks)
    tensors = folder.read_tensors(_file(float(target.value), "safetensors"))
    trained = None
    if weights := named(tensors, "weights"):
        trained = deep_copy(dense)
        trained.load_state_dict(weights)
    text = (
        f"plan and weights as in {recipe.prune.from_run} when its budget passed {percent(target.value)} of the "
        f"{target.kind}, after step {facts['step']} of {facts['steps']}"
    )
    return Selection(plan, named(tensors, "scores"), text, _read_prompt(tensors, recipe), None, trained, facts["step"])


def _read_prompt(tensors: Mapping[str, Tensor], recipe: Recipe) -> VisualPrompt | None:
    if PROMPT_KEY not in tensors:
        return None
    spec, pixels = recipe.prune.prompt, tensors[PROMPT_KEY]
    prompt = VisualPrompt(spec.kind, (pixels.size(1), pixels.size(2), pixels.size(3)), spec.size)
    prompt.load_pixels_(tensors)
    return prompt


def _facts(folder: RunFolder, share: float | None) -> dict[str, Any]:
    """Read what is written about a snapshot; None: no share that it could have."""
    if share is None or not folder.has(_file(share, "json")):
        there = ", ".join(map(str, _shares(folder))) or "none"
        raise RunError(
            f"{folder.path} has no snapshot of mask learning for this target; it has: {there}.\n"
            "Name one of these as prune.target, of the same kind as there, or learn with prune.targets."
        )
    facts: dict[str, Any] = folder.read_json(_file(share, "json"))
    return facts


def _shares(folder: RunFolder) -> Iterator[float]:
    for name in folder.manifest():
        if name.startswith("snapshots/") and name.endswith(".json"):
            yield float(name.removeprefix("snapshots/").removesuffix(".json"))


def _file(share: float, suffix: str) -> str:
    return f"snapshots/{share}.{suffix}"
