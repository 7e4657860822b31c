"""Description of channel groups, blocks and a recipe's budget as plain data, for `passdeploy inspect` and `check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from passdeploy.channels.allocation import cheapest_widths, narrowest_widths
from passdeploy.channels.blocks import Block, presence
from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelMap
from passdeploy.display.units import quantity
from passdeploy.errors import ModelError, enumerated, percent
from passdeploy.grouping.find import map_channels
from passdeploy.models.build import build_model
from passdeploy.models.diagnosis import image_errors

if TYPE_CHECKING:
    from passdeploy.commands.prepare import Prepared
    from passdeploy.latency.target import LatencyTarget


def inspect_model(
    name: str, *, num_classes: int, image_size: int, weights: str | None = None, allow_code: bool = False
) -> ChannelMap:
    """Build a model by name and find its channel groups and blocks with one image.

    Raises:
        ModelError: the model is unknown, or takes no RGB images in float32.
        UsageError: it does not take images of this size.
    """
    model = build_model(name, num_classes=num_classes, weights=weights, allow_code=allow_code)
    with image_errors(model, name, image_size, advice="Choose another --image-size."):
        return map_channels(model, torch.zeros(1, 3, image_size, image_size), with_blocks=True)


def describe(channels: ChannelMap, *, round_to: int) -> dict[str, Any]:
    """Describe channel groups, blocks, counts and the smallest counts that widths can reach, as a document for JSON.

    Each group has its `name`, `width`, `layers`, whether it `is_prunable`, else the `reason`, and `macs_share`: the
    share of the multiply-adds that would go if this group alone lost all its channels. A layer's multiply-adds count
    for its input and its output group, so the shares add up to more than 1. A block has the shares of multiply-adds
    and of parameters that go with it, and the line of code (`source`) where its branch joins its input. `idle_layers`
    did not run: they stay whole, and fail where other images reach them after what they read was cut.

    Raises:
        ModelError: no layer has channels.
    """
    costs, prunable = channels.costs, channels.prunable
    minimum = narrowest_widths(prunable, costs, round_to=round_to)
    macs = costs.of("macs")
    total = sum(group.width * group.span for group in channels.groups)
    removable = sum(group.width * group.span for group in prunable)
    counts = {kind: costs.of(kind) for kind in ("macs", "params")}
    reachable = {kind: costs.of(kind, minimum) for kind in counts}
    if not (total and macs and counts["params"]):
        raise ModelError("the network has no layer with weights that puts out channels, so nothing can be cut.")
    return {
        **counts,
        "smallest": reachable,
        "round_to": round_to,
        "groups": [
            {
                "name": group.name,
                "width": group.width,
                "layers": list(group.layers),
                "macs_share": 1 - costs.of("macs", {group.name: 0}) / macs if group.is_prunable else 0.0,
                "is_prunable": group.is_prunable,
                "reason": "" if group.is_prunable else group.reason or "a single channel",
            }
            for group in channels.groups
        ],
        "blocks": [
            {
                "name": block.name,
                "modules": list(block.modules),
                "groups": list(block.groups),
                **{f"{kind}_share": _share_of(block, kind, costs) for kind in ("macs", "params")},
                "is_prunable": block.is_prunable,
                "reason": block.reason,
                "source": block.source,
            }
            for block in channels.blocks
        ],
        "idle_layers": list(channels.idle_layers),
        "words": [
            f"{len(prunable)} of {len(channels.groups)} channel groups can be cut, "
            f"{percent(removable / total, 0)} of the channels",
            f"{quantity(counts['macs'])} MACs, {quantity(counts['params'])} parameters; with widths in multiples of "
            f"{round_to}{', without blocks' if costs.blocks else ''}",
            f"no fewer than {percent(reachable['macs'] / macs)} of the MACs and "
            f"{percent(reachable['params'] / counts['params'])} of the parameters can be reached",
            *_block_words(channels),
            *_idle_words(channels.idle_layers),
        ],
    }


def _share_of(block: Block, kind: str, costs: CostModel) -> float:
    """Compute the share of a count that goes with a block."""
    return 1 - costs.of(kind, {presence(block.name): 0}) / costs.of(kind) if block.is_prunable else 0.0


def _block_words(channels: ChannelMap) -> list[str]:
    """Describe in a line how many blocks can be skipped; nothing where none were looked for, or there are none."""
    if not channels.blocks:
        return []
    prunable = [block for block in channels.blocks if block.is_prunable]
    without = {presence(block.name): 0 for block in prunable}
    left = channels.costs.of("macs", without) / channels.costs.of("macs")
    share = f"; without them {percent(left)} of the MACs are left" if prunable else ""
    return [f"{len(prunable)} of {len(channels.blocks)} blocks can be skipped{share}"]


def _idle_words(layers: Sequence[str]) -> list[str]:
    """Name the layers that did not run, at most three of them."""
    if not layers:
        return []
    return [f"did not run, so that nobody knows which channels they read: {enumerated(layers)}; they stay as they are"]


def describe_run(prepared: Prepared) -> dict[str, Any]:
    """Describe the model, data, budget and latency target of a prepared recipe."""
    return {
        "model": prepared.recipe.model.name,
        "images": {"train": len(prepared.data.train), "test": len(prepared.data.test)},
        "data": asdict(contents) if (contents := prepared.data.contents) is not None else None,
        "classes": list(prepared.data.classes),
        "budget": {"kind": prepared.budget.kind, "limit": prepared.budget.limit},
        "latency": _describe_target(prepared.target) if prepared.target is not None else None,
    }


def _describe_target(target: LatencyTarget) -> dict[str, Any]:
    """Describe a latency target: dense, asked for and fastest reachable latency in ms, and the error of the table."""
    channels = target.channels
    fastest = cheapest_widths(channels.prunable, channels.costs, round_to=target.round_to, kind="latency")
    return {
        **target.conditions,
        "dense_ms": target.dense_ms,
        "asked_ms": target.budget.limit / 1e6,
        "fastest_ms": target.table.predict_ms(fastest),
        "error": target.table.error[0],
    }
