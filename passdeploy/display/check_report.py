"""Output of `passdeploy check` and `inspect`: channel groups, blocks, the latency target and the expected run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from passdeploy.display.listing import Footnotes, Listing
from passdeploy.display.units import duration, milliseconds
from passdeploy.errors import percent


def latency_lines(latency: Mapping[str, Any] | None) -> list[str]:
    """Describe a latency target in a few lines; return none where the recipe has none."""
    if latency is None:
        return []
    threads = f"{latency['threads']} thread{'s' if latency['threads'] > 1 else ''}"
    return [
        f"{milliseconds(latency['dense_ms'])} dense ({latency['backend']}, batch {latency['batch']}, {threads}); "
        f"asked for {milliseconds(latency['asked_ms'])}",
        f"the fastest that can be reached is about {milliseconds(latency['fastest_ms'])}; "
        f"the table is off by {percent(latency['error'])} in the median",
    ]


def run_time_line(seconds: Mapping[str, float]) -> str:
    """Describe in one line how long a run will take here; stages of less than a second are not named."""
    names = {"dense": "dense network", "learn": "mask learning", "finetune": "fine-tuning"}
    parts = ", ".join(f"{names[stage]} {duration(took)}" for stage, took in seconds.items() if took >= 1)
    return f"a run takes about {duration(sum(seconds.values()))} here{f' ({parts})' if parts else ''}"


def groups_table(document: Mapping[str, Any]) -> Listing:
    """Build the table of channel groups from a `describe` document, one group a row; reasons are notes under it."""
    notes, rows = Footnotes(), []
    for group in document["groups"]:
        share = percent(group["macs_share"]) if group["is_prunable"] else ""
        reason = notes.number_of(group["reason"] and f"stays because: {group['reason']}")
        rows.append((group["name"], str(group["width"]), str(len(group["layers"])), share, reason))
    headings = ("group", "width", "layers", "MACs", "stays")
    return Listing(headings, tuple(rows), str(document["model"]), notes.lines())


def blocks_table(document: Mapping[str, Any]) -> Listing | None:
    """Build the table of blocks from a `describe` document, one block a row; None where there are none.

    The shares are those that go with a block. Reasons are notes under the table, each with the lines of code.
    """
    if not document["blocks"]:
        return None
    sources: dict[str, dict[str, None]] = {}
    for block in document["blocks"]:
        sources.setdefault(block["reason"], {})[block["source"]] = None
    notes, rows = Footnotes(), []
    for block in document["blocks"]:
        shares = [percent(block[f"{kind}_share"]) if block["is_prunable"] else "" for kind in ("macs", "params")]
        reason = block["reason"] and f"stays because: {block['reason']} ({', '.join(sources[block['reason']])})"
        rows.append((block["name"], *shares, notes.number_of(reason)))
    return Listing(("block", "MACs", "parameters", "stays"), tuple(rows), "", notes.lines())
