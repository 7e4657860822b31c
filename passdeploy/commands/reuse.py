"""Reading of a plan or a hypernetwork of another run (`prune.from_run`)."""

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


def read_reused_run(recipe: Recipe, channels: ChannelMap) -> ReusedRun:
    """Read what `prune.reuse` names, a plan or a hypernetwork, from the run that `prune.from_run` names.

    Raises:
        RunError: there is no such run, or it has no hypernetwork.
        PlanError: the plan does not fit this network.
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
