"""Changes that a plan made, at a glance: widths before and after, what each group saved, and the blocks that went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from passdeploy.display.listing import Listing
from passdeploy.errors import percent

MOST_ROWS = 24  # of groups on a terminal; what is left out is summed up in a line
_BAR = 12  # characters of a whole width


def widths_table(summary: Mapping[str, Any], most: int | None = MOST_ROWS) -> Listing | None:
    """Build the table of channel groups: width before and after, and the share of the costs that each saved.

    Args:
        summary: content of `summary.json`.
        most: rows; of more groups those are shown that saved most, in the order of the network. None: all.

    Returns:
        The table; None where the run was made before summaries had `groups`.
    """
    groups = summary.get("groups")
    if not groups:
        return None
    shown = _most_saved(groups, most)
    has_time = any("latency_saved" in group for group in groups)
    rows = []
    for group in shown:
        width, kept = group["width"], group["kept"]
        rows.append(
            (
                group["name"],
                f"{width} → {kept}" if kept != width else str(width),
                percent(kept / width, 0),
                bar(kept / width),
                percent(group["macs_saved"]) if kept != width else "",
                *((percent(group.get("latency_saved", 0.0)) if kept != width else "",) if has_time else ()),
            )
        )
    headings = ("group", "channels", "kept", "", "MACs saved", *(("time saved",) if has_time else ()))
    total = sum(part["macs_saved"] for part in [*groups, *(summary.get("blocks") or ())])
    notes = [f"saved: share of the dense network's; together {percent(total)} of the MACs"]
    if rest := len(groups) - len(shown):
        notes.append(f"{rest} more groups saved less; the report shows them all")
    if blocks := summary.get("blocks"):
        notes.append(f"blocks that went: {blocks_text(blocks)}")
    return Listing(headings, tuple(rows), "what was cut", tuple(notes), left=frozenset({0, 3}))


def blocks_text(blocks: Sequence[Mapping[str, Any]]) -> str:
    """List skipped blocks, each with what it saved."""
    return ", ".join(f"{block['name']} ({_savings(block)})" for block in blocks)


def _savings(block: Mapping[str, Any]) -> str:
    """Say what a block saved of the multiply-adds, and of the time where that is known."""
    macs = f"{percent(block['macs_saved'])} of the MACs"
    return f"{macs}, {percent(block['latency_saved'])} of the time" if "latency_saved" in block else macs


def bar(share: float) -> str:
    """Draw a share of a whole as a bar of text.

    >>> bar(0.5)
    '██████░░░░░░'
    """
    full = round(share * _BAR)
    return "█" * full + "░" * (_BAR - full)


def _most_saved(groups: Sequence[Mapping[str, Any]], most: int | None) -> list[Mapping[str, Any]]:
    """Return the groups that saved most, in the order of the network."""
    if most is None or len(groups) <= most + most // 4:  # a few more rows are better than a note
        return list(groups)
    first = sorted(range(len(groups)), key=lambda index: -float(groups[index]["macs_saved"]))[:most]
    return [groups[index] for index in sorted(first)]
