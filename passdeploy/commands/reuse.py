"""Read what `prune.from_run` takes over from another run: its plan or its hypernetwork."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.errors import RunError
from passdeploy.runs.folder import RunFolder
from passdeploy.sparsity.select import ReusedRun

if TYPE_CHECKING:
    from passdeploy.recipe import Recipe


def read_source(recipe: Recipe, channels: ChannelMap) -> ReusedRun:
    """What `prune.from_run` and `prune.reuse` name, checked against the network.

    Raises:
        RunError: no such run, or it has none.
        PlanError: the plan is of another network.
    """
    path = Path(str(recipe.prune.from_run))
    folder = RunFolder.open(path)
    if recipe.prune.reuse == "plan":
        document: dict[str, Any] = folder.read_json("plan.json")["groups"]
        plan = Plan({name: tuple(entry["kept"]) for name, entry in document.items()})
        plan.check(channels.groups)
        return ReusedRun(plan)
    if recipe.prune.method != "pass" or not folder.has("hypernetwork.safetensors"):
        raise RunError(
            f"prune.reuse is hypernetwork, but prune.method is {recipe.prune.method} or {path} learned none.\n"
            "Name a run that was made with prune.method pass, and use that method here."
        )
    return ReusedRun(hypernetwork=folder.read_tensors("hypernetwork.safetensors"))
