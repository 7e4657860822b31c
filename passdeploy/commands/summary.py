"""Content of summary.json: budget, accuracy, size and latency of a finished run, and the seconds of its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passdeploy.channels.blocks import presence, skipped_blocks
from passdeploy.channels.savings import savings_by_part
from passdeploy.runs.plan_file import plan_from_json
from passdeploy.runtime.versions import package_versions

if TYPE_CHECKING:
    from passdeploy.channels.blocks import Block
    from passdeploy.channels.costs import CostModel
    from passdeploy.channels.plan import Plan
    from passdeploy.data.splits import ImageData
    from passdeploy.latency.target import LatencyTarget
    from passdeploy.recipe import Recipe
    from passdeploy.runs.folder import RunFolder


def summarise(
    folder: RunFolder,
    recipe: Recipe,
    *,
    images: Mapping[str, Any],
    costs: CostModel,
    blocks: Sequence[Block],
    target: LatencyTarget | None,
    latency: Sequence[dict[str, Any]],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Build the content of summary.json.

    Args:
        folder: of a run whose stages are finished.
        recipe: of the run.
        images: see `images_per_class`.
        costs: multiply-adds and parameters of the network as a function of its widths.
        blocks: of the network, also those that the costs do not know: a plan that was taken over may skip them.
        target: the latency target; None if the budget is not a latency.
        latency: rows as in `profile.json`.
        environment: device and determinism, see `reproducibility_facts`.
    """
    dense, cut, finetuned = (folder.result_of(name) for name in ("dense", "slim", "finetune"))
    document = folder.read_json("plan.json")
    plan = plan_from_json(document)
    size = {kind: (costs.of(kind), costs.of(kind, plan.widths())) for kind in ("params", "macs")}
    return {
        "recipe": recipe.name,
        "model": recipe.model.name,
        "method": recipe.prune.method,
        "seed": recipe.seed,
        "dense": {"top1": dense["top1"], **{kind: before for kind, (before, _) in size.items()}},
        "slim": {
            "top1": finetuned["top1"],
            "top1_before_finetune": cut["top1"],
            **{kind: after for kind, (_, after) in size.items()},
        },
        "answers": finetuned.get("answers"),  # how many images became right and wrong against the dense network
        "prompt": _prompt_result(recipe, cut["prompt"], finetuned["prompt"]),
        "budget": _budget_result(folder, recipe, costs, target, cut["achieved"]),
        **_snapshot(folder, recipe),
        "equivalence": {"max_rel_error": cut["max_rel_error"], "input_shapes": cut.get("input_shapes", [])},
        **_changes(costs, document["groups"], plan, blocks),
        "images": dict(images),
        "latency": list(latency),
        "seconds": {name: folder.result_of(name)["seconds"] for name in folder.done_stages()},
        "versions": package_versions(),
        "environment": dict(environment),
    }


def _snapshot(folder: RunFolder, recipe: Recipe) -> dict[str, Any]:
    """Return `snapshot`, the run whose mask learning this one goes on from and its steps; nothing if there is none."""
    if not recipe.prune.takes_snapshot:
        return {}
    steps = folder.result_of("learn")["steps_before"]
    return {"snapshot": {"run": Path(str(recipe.prune.from_run)).name, "steps": steps}}


def images_per_class(data: ImageData) -> dict[str, dict[str, int]]:
    """Count the images of every class: `train` and `test`, each class name -> count; empty if unknown."""
    contents = data.contents
    return {} if contents is None else {"train": dict(contents.train), "test": dict(contents.test)}


def _changes(costs: CostModel, groups: Mapping[str, Any], plan: Plan, blocks: Sequence[Block]) -> dict[str, Any]:
    """Return what each prunable group and each skipped block saved, as shares of the dense network's costs.

    `groups`: name, width before (`width`) and after (`kept`), `macs_saved`, `params_saved` and, with a latency table,
    `latency_saved` as the table predicts it; groups that went with a block are left out. `blocks`: name, and the same
    shares.
    """
    gone = {group for block in skipped_blocks(blocks, plan.skipped) for group in block.groups}
    kinds = ["macs", "params", *(["latency"] if costs.latency is not None else [])]
    saved = {kind: savings_by_part(costs, kind, plan.widths()) for kind in kinds}
    return {
        "groups": [
            {
                "name": name,
                "width": entry["width"],
                "kept": len(entry["kept"]),
                **{f"{kind}_saved": saved[kind][name] for kind in kinds},
            }
            for name, entry in groups.items()
            if name not in gone
        ],
        "blocks": [
            {"name": name, **{f"{kind}_saved": saved[kind][presence(name)] for kind in kinds}} for name in plan.skipped
        ],
    }


def _prompt_result(recipe: Recipe, cut: Any, finetuned: Any) -> dict[str, Any] | None:
    """Return top-1 with and without the prompt, before and after fine-tuning; None if no prompt was learned."""
    return None if finetuned is None else {"keep": recipe.prune.prompt.keep, **finetuned, "before_finetune": cut}


def _budget_result(
    folder: RunFolder, recipe: Recipe, costs: CostModel, target: LatencyTarget | None, achieved: int
) -> dict[str, Any]:
    """Return the requested and the achieved budget; for a latency the measured one, with backend, batch and device."""
    kind, requested = recipe.prune.target.kind, recipe.prune.target.value
    if target is not None:
        return {"kind": kind, "requested": requested, **folder.result_of("time")["timed"], **target.conditions}
    whole = costs.of(kind)
    return {"kind": kind, "requested": requested, "achieved": achieved / whole if requested <= 1 else achieved}
