"""What `passdeploy check` and `inspect` print: channel groups, latency and time in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from passdeploy.display.units import duration


def latency_words(latency: Mapping[str, Any] | None) -> list[str]:
    """What a latency target comes to, in a line; none where nothing of the kind is asked for."""
    if latency is None:
        return []
    return [
        f"{latency['dense_ms']:.3g} ms dense ({latency['backend']}, batch {latency['batch']}, {latency['threads']} "
        f"threads); asked for {latency['asked_ms']:.3g} ms, the fastest that can be reached is about "
        f"{latency['fastest_ms']:.3g} ms; the table is off by {latency['error']:.1%} in the median"
    ]


def time_words(seconds: Mapping[str, float]) -> str:
    """How long a run will take here, in a line."""
    names = {"dense": "dense network", "learn": "mask learning", "finetune": "fine-tuning"}
    parts = ", ".join(f"{names[stage]} {duration(took)}" for stage, took in seconds.items() if took >= 1)
    return f"a run takes about {duration(sum(seconds.values()))} here{f' ({parts})' if parts else ''}"


def table(document: Mapping[str, Any]) -> Table:
    """The groups of a `describe` document, one a row."""
    shown = Table(title=str(document["model"]), title_justify="left")
    shown.add_column("group", overflow="fold")
    for heading in ("width", "layers", "MACs"):
        shown.add_column(heading, justify="right")
    shown.add_column("stays because", overflow="fold")
    for group in document["groups"]:
        share = f"{group['macs_share']:.1%}" if group["is_prunable"] else ""
        shown.add_row(group["name"], str(group["width"]), str(len(group["layers"])), share, group["reason"])
    return shown
