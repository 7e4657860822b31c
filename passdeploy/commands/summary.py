"""summary.json: what a run was asked for, what it found, and what that cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from passdeploy.runs.plan_file import plan_from_json
from passdeploy.runtime.versions import package_versions

if TYPE_CHECKING:
    from passdeploy.channels.costs import CostModel
    from passdeploy.latency.target import LatencyTarget
    from passdeploy.recipe import Recipe
    from passdeploy.runs.folder import RunFolder


def summarise(
    folder: RunFolder,
    recipe: Recipe,
    *,
    costs: CostModel,
    target: LatencyTarget | None,
    latency: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        folder: of a run whose stages are finished.
        recipe: what was asked for.
        costs: of the network as a function of its widths.
        target: the latency that was asked for, if one was.
        latency: rows as in `profile.json`.
    """
    dense, cut, tuned = (folder.result_of(name) for name in ("dense", "slim", "finetune"))
    widths = plan_from_json(folder.read_json("plan.json")).widths()
    size = {kind: (costs.of(kind), costs.of(kind, widths)) for kind in ("params", "macs")}
    return {
        "recipe": recipe.name,
        "model": recipe.model.name,
        "method": recipe.prune.method,
        "seed": recipe.seed,
        "dense": {"top1": dense["top1"], **{kind: before for kind, (before, _) in size.items()}},
        "slim": {
            "top1": tuned["top1"],
            "top1_before_finetune": cut["top1"],
            **{kind: after for kind, (_, after) in size.items()},
        },
        "prompt": _prompt(recipe, cut["prompt"], tuned["prompt"]),
        "budget": _budget(folder, recipe, costs, target, cut["achieved"]),
        "equivalence": {"max_rel_error": cut["max_rel_error"]},
        "latency": list(latency),
        "seconds": {name: folder.result_of(name)["seconds"] for name in folder.done_stages()},
        "versions": package_versions(),
    }


def _prompt(recipe: Recipe, cut: Any, tuned: Any) -> dict[str, Any] | None:
    """What the prompt does for the slim network, before and after fine-tuning; None where none was learned."""
    return None if tuned is None else {"keep": recipe.prune.prompt.keep, **tuned, "before_finetune": cut}


def _budget(
    folder: RunFolder, recipe: Recipe, costs: CostModel, target: LatencyTarget | None, achieved: int
) -> dict[str, Any]:
    """What was asked for and what there is; a latency is the measured one, with what it was measured on."""
    kind, requested = recipe.prune.target.kind, recipe.prune.target.value
    if target is not None:
        return {"kind": kind, "requested": requested, **folder.result_of("time")["timed"], **target.on}
    whole = costs.of(kind)
    return {"kind": kind, "requested": requested, "achieved": achieved / whole if requested <= 1 else achieved}
