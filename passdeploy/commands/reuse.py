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
from passdeploy.sparsity.scorer import require_fitting_hypernetwork
from passdeploy.sparsity.select import ReusedRun
from passdeploy.sparsity.settings import PassSettings

if TYPE_CHECKING:
    from passdeploy.recipe import Recipe


def read_reused_run(recipe: Recipe, channels: ChannelMap, dense: nn.Module) -> ReusedRun:
    """Read what `prune.reuse` names, a plan, a hypernetwork or a snapshot, from the run that `prune.from_run` names.

    Args:
        recipe: of the run that goes on from it.
        channels: of the network.
        dense: the network, with any weights; it is left as it was.

    Raises:
        RunError: there is no such run, or it is of another network, or it has no hypernetwork, or one that was made
            with other settings, or no snapshot for this target.
        PlanError: the plan does not fit this network.
    """
    path = Path(str(recipe.prune.from_run))
    folder = RunFolder.open(path)
    if recipe.prune.reuse == "plan":
        document = folder.read_json("plan.json")
        plan = plan_from_json(document)
        plan.check(channels.groups, channels.blocks)
        # another network may have all groups of the plan, and more
        if document["model"] != recipe.model.name and {*document["groups"]} != {one.name for one in channels.prunable}:
            raise RunError(
                f"{path} pruned {document['model']}, and this is {recipe.model.name}, which has other channel groups.\n"
                "Name a run of the same network."
            )
        return ReusedRun(plan)
    if recipe.prune.reuse == "snapshot":
        snapshot = read_snapshot(folder, recipe, channels, dense)
        return ReusedRun(snapshot=snapshot, dense=folder.read_tensors("dense.safetensors"))
    if recipe.prune.method != "pass" or not folder.has("hypernetwork.safetensors"):
        raise RunError(
            f"prune.reuse is hypernetwork, but prune.method is {recipe.prune.method} or {path} learned none.\n"
            "Name a run that was made with prune.method pass, and use that method here."
        )
    start = folder.read_tensors("hypernetwork.safetensors")
    settings = PassSettings.from_recipe(recipe, round_to=1)
    require_fitting_hypernetwork(start, dense, channels.prunable, settings, blocks=channels.costs.blocks)
    return ReusedRun(hypernetwork=start)
