"""plan.json: which channels a run kept, and all else that the slim network is rebuilt and fed with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from passdeploy.channels.plan import Plan
from passdeploy.slimming.size_attributes import size_attributes_after

if TYPE_CHECKING:
    from passdeploy.channels.groups import ChannelMap
    from passdeploy.data.splits import ImageData
    from passdeploy.models.prompt import VisualPrompt


def plan_to_json(
    plan: Plan, *, model: str, data: ImageData, channels: ChannelMap, prompt: VisualPrompt | None
) -> dict[str, Any]:
    """The content of plan.json.

    Args:
        plan: what was kept.
        model: the name of the factory.
        data: its classes, image shape and normalisation go with the network.
        channels: the groups that the plan is about.
        prompt: what the network is to see around its images, if anything.
    """
    return {
        "version": 1,
        "model": model,
        "classes": list(data.classes),
        "image_shape": list(data.image_shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "prompt": {"kind": prompt.kind, "size": prompt.size} if prompt is not None else None,
        "groups": {
            group.name: {"width": group.width, "kept": list(plan.kept.get(group.name, range(group.width)))}
            for group in channels.prunable
        },
        "numbers": [
            [size.module, size.attribute, size.index, value]
            for size, value in size_attributes_after(channels.groups, plan)
        ],
    }


def plan_from_json(document: dict[str, Any]) -> Plan:
    """The plan in a `plan.json`."""
    return Plan({name: tuple(entry["kept"]) for name, entry in document["groups"].items()})
