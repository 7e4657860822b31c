"""The plan.json of a run: kept channels, skipped blocks, and all else that rebuilds the slim network and its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from passdeploy.channels.blocks import Block, Replacement, replacements_of
from passdeploy.channels.groups import ChannelGroup, SizeAttribute
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
    return {
        "version": 1,
        "model": model,
        "classes": list(data.classes),
        "image_shape": list(data.image_shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "preprocessing": data.preprocessing.model_dump(mode="json", include={"interpolation", "crop"}),
        "prompt": {"kind": prompt.kind, "size": prompt.size} if prompt is not None else None,
        **cut_to_json(plan, channels.groups, channels.blocks),
    }


def cut_to_json(plan: Plan, groups: Sequence[ChannelGroup], blocks: Sequence[Block]) -> dict[str, Any]:
    """Describe by plain values how a plan cuts a network: with the tensors that are left, this rebuilds the slim one.

    `groups`: prunable group -> its width and the kept channels. `numbers`: module, attribute, index and value of the
    sizes that the code stores. `skipped`: names of blocks. `replaced`: what takes the place of their modules.
    """
    return {
        "groups": {
            group.name: {"width": group.width, "kept": list(plan.kept.get(group.name, range(group.width)))}
            for group in groups
            if group.is_prunable
        },
        "numbers": [
            [size.module, size.attribute, size.index, value]
            for size, value in size_attributes_after(groups, plan, blocks)
        ],
        "skipped": list(plan.skipped),
        "replaced": [one.to_json() for one in replacements_of(blocks, plan.skipped)],
    }


def plan_from_json(document: dict[str, Any]) -> Plan:
    """Read the plan out of the content of a plan.json."""
    kept = {name: tuple(entry["kept"]) for name, entry in document["groups"].items()}
    return Plan(kept, tuple(document.get("skipped", ())))  # plans of earlier versions skip nothing


def sizes_from_json(document: Mapping[str, Any]) -> list[tuple[SizeAttribute, int]]:
    """Read the sizes that the code of the slim network stores out of what `cut_to_json` made."""
    return [(SizeAttribute(module, attribute, index), value) for module, attribute, index, value in document["numbers"]]


def replacements_from_json(document: Mapping[str, Any]) -> list[Replacement]:
    """Read the modules that the skipped blocks give way to out of what `cut_to_json` made."""
    return [Replacement.from_json(values) for values in document.get("replaced", ())]
