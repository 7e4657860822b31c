"""Output of `passdeploy check` and `inspect`: channel groups, the latency target and the expected run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from passdeploy.display.units import duration


def latency_lines(latency: Mapping[str, Any] | None) -> list[str]:
    """Describe a latency target in one line; return no line where the recipe has none."""
    if latency is None:
        return []
    return [
        f"{latency['dense_ms']:.3g} ms dense ({latency['backend']}, batch {latency['batch']}, {latency['threads']} "
        f"threads); asked for {latency['asked_ms']:.3g} ms, the fastest that can be reached is about "
        f"{latency['fastest_ms']:.3g} ms; the table is off by {latency['error']:.1%} in the median"
    ]


def run_time_line(seconds: Mapping[str, float]) -> str:
    """Describe in one line how long a run will take here; stages of less than a second are not named."""
    names = {"dense": "dense network", "learn": "mask learning", "finetune": "fine-tuning"}
    parts = ", ".join(f"{names[stage]} {duration(took)}" for stage, took in seconds.items() if took >= 1)
    return f"a run takes about {duration(sum(seconds.values()))} here{f' ({parts})' if parts else ''}"


def groups_table(document: Mapping[str, Any]) -> Table:
    """Build the table of channel groups from a `describe` document, one group a row."""
    table = Table(title=str(document["model"]), title_justify="left")
    table.add_column("group", overflow="fold")
    for heading in ("width", "layers", "MACs"):
        table.add_column(heading, justify="right")
    table.add_column("stays because", overflow="fold")
    for group in document["groups"]:
        share = f"{group['macs_share']:.1%}" if group["is_prunable"] else ""
        table.add_row(group["name"], str(group["width"]), str(len(group["layers"])), share, group["reason"])
    return table
