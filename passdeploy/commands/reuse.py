"""Reading of a plan, a hypernetwork or a snapshot of another run (`prune.from_run`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from passdeploy.channels.groups import ChannelMap
from passdeploy.commands.snapshots import read_snapshot
from passdeploy.errors import RunError
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.plan_file import plan_from_json
from passdeploy.sparsity.select import ReusedRun

if TYPE_CHECKING:
    from passdeploy.recipe import Recipe


def read_reused_run(recipe: Recipe, channels: ChannelMap, dense: nn.Module) -> ReusedRun:
    """Read what `prune.reuse` names, a plan, a hypernetwork or a snapshot, from the run that `prune.from_run` names.

    Args:
        recipe: of the run that goes on from it.
        channels: of the network.
        dense: the network, with any weights; it is left as it was.

    Raises:
        RunError: there is no such run, or it has no hypernetwork, or no snapshot for this target.
        PlanError: the plan does not fit this network.
    """
    path = Path(str(recipe.prune.from_run))
    folder = RunFolder.open(path)
    if recipe.prune.reuse == "plan":
        plan = plan_from_json(folder.read_json("plan.json"))
        plan.check(channels.groups, channels.blocks)
        return ReusedRun(plan)
    if recipe.prune.reuse == "snapshot":
        snapshot = read_snapshot(folder, recipe, channels, dense)
        return ReusedRun(snapshot=snapshot, dense=folder.read_tensors("dense.safetensors"))
    if recipe.prune.method != "pass" or not folder.has("hypernetwork.safetensors"):
        raise RunError(
            f"prune.reuse is hypernetwork, but prune.method is {recipe.prune.method} or {path} learned none.\n"
            "Name a run that was made with prune.method pass, and use that method here."
        )
    return ReusedRun(hypernetwork=folder.read_tensors("hypernetwork.safetensors"))
