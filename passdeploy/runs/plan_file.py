"""The plan.json of a run: kept channels, skipped blocks, and all else that rebuilds the slim network and its input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from passdeploy.channels.blocks import Replacement, replacements_of
from passdeploy.channels.plan import Plan
from passdeploy.slimming.size_attributes import size_attributes_after

if TYPE_CHECKING:
    from passdeploy.channels.groups import ChannelMap
    from passdeploy.data.splits import ImageData
    from passdeploy.models.prompt import VisualPrompt


def plan_to_json(
    plan: Plan, *, model: str, data: ImageData, channels: ChannelMap, prompt: VisualPrompt | None
) -> dict[str, Any]:
    """Make the content of plan.json.

    Args:
        plan: the kept channels and the skipped blocks.
        model: name of the network, as `build_model` takes it.
        data: the data set; its classes, image shape and normalisation are written down.
        channels: the groups and blocks that the plan is about.
        prompt: the visual prompt in front of the network, if any.
    """
    replaced = replacements_of(channels.blocks, plan.skipped)
    return {
        "version": 1,
        "model": model,
        "classes": list(data.classes),
        "image_shape": list(data.image_shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "preprocessing": data.preprocessing.model_dump(mode="json", include={"interpolation", "crop"}),
        "prompt": {"kind": prompt.kind, "size": prompt.size} if prompt is not None else None,
        "groups": {
            group.name: {"width": group.width, "kept": list(plan.kept.get(group.name, range(group.width)))}
            for group in channels.prunable
        },
        "numbers": [
            [size.module, size.attribute, size.index, value]
            for size, value in size_attributes_after(channels.groups, plan, channels.blocks)
        ],
        "skipped": list(plan.skipped),
        "replaced": [one.to_json() for one in replaced],
    }


def plan_from_json(document: dict[str, Any]) -> Plan:
    """Read the plan out of the content of a plan.json."""
    kept = {name: tuple(entry["kept"]) for name, entry in document["groups"].items()}
    return Plan(kept, tuple(document.get("skipped", ())))  # plans of earlier versions skip nothing


def replacements_from_json(document: dict[str, Any]) -> list[Replacement]:
    """Read the modules that the skipped blocks give way to out of the content of a plan.json."""
    return [Replacement.from_json(values) for values in document.get("replaced", ())]
