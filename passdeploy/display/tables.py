"""Tables of results for a terminal: accuracy and size, latency, layers, groups, sweeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from passdeploy.display.units import UNKNOWN, milliseconds, quantity, relative_change


def sweep_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Describe the rows of a `--sweep-round`, one a line, and the best one in the last line."""
    lines, reached = [], [row for row in rows if "refused" not in row]
    for row in rows:
        if "refused" in row:
            lines.append(f"multiples of {row['round_to']:>3}: {row['refused']}")
        else:
            lines.append(
                f"multiples of {row['round_to']:>3}: {row['slim_ms']:.3g} ms ({row['achieved']:.1%} of dense), "
                f"keeps {row['kept']:.1%} of the score"
            )
    if reached:
        best = max(reached, key=lambda row: row["kept"])
        lines.append(f"best: prune.round_to={best['round_to']}, which keeps the most in that time")
    return lines


def summary_table(summary: Mapping[str, Any], profile_rows: Iterable[Mapping[str, Any]] = ()) -> Table:
    """Build the table of dense against slim: accuracy and size of a run, and latency where it was measured.

    Args:
        summary: content of `summary.json`; a number that is missing or null shows as a dash.
        profile_rows: the `rows` of `profile.json`; a slim row is paired with the dense row of the same backend,
            precision, batch, device and options.
    """
    dense, slim = summary.get("dense") or {}, summary.get("slim") or {}
    table = Table("", title=summary.get("model"), title_justify="left")
    for heading in ("dense", "slim", "change"):
        table.add_column(heading, justify="right")
    table.add_row("top-1", *_accuracy_cells(dense.get("top1"), slim.get("top1")))
    for label, key in (("parameters", "params"), ("MACs", "macs")):
        before, after = dense.get(key), slim.get(key)
        table.add_row(label, quantity(before), quantity(after), relative_change(before, after))
    rows = list(profile_rows)
    devices = {str(row["device"]) for row in rows if row.get("device")}
    if len(devices) == 1:
        table.caption, table.caption_justify = f"latency: median on {devices.pop()}", "left"
        rows = [{**row, "device": None} for row in rows]
    dense_rows = {_measurement_label(row): row for row in rows if row["model"] == "dense"}
    slim_rows = {_measurement_label(row): row for row in rows if row["model"] == "slim"}
    for label in dict.fromkeys([*dense_rows, *slim_rows]):
        before, after = dense_rows.get(label, {}), slim_rows.get(label, {})
        table.add_row(
            "latency " + label,
            milliseconds(before.get("median_ms")),
            milliseconds(after.get("median_ms")),
            _speedup_text(after),
        )
    return table


def _speedup_text(row: Mapping[str, Any]) -> str:
    """Describe the speed-up of a row with its interval, or say that there is no measurable difference."""
    from passdeploy.profiling.statistics import is_measurable  # here, because it imports torch, which takes seconds

    speedup, interval = row.get("speedup"), row.get("speedup_ci")
    if not speedup:
        return UNKNOWN
    if interval and not is_measurable(*interval):
        return "no measurable difference"
    words = f"{speedup:.2f}x faster" if speedup >= 1 else f"{1 / speedup:.2f}x slower"
    return f"{words} ({interval[0]:.2f} to {interval[1]:.2f})" if interval else words


def profile_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Build a table of the rows of a profile: batch, latencies, images per second and speed-up."""
    table = Table(title_justify="left")
    table.add_column("model", overflow="fold")
    for heading in ("batch", "median", "p90", "p99", "images/s", "speed-up"):
        table.add_column(heading, justify="right")
    for row in rows:
        low, high = row["speedup_ci"]
        speedup = "" if low == high == 1 else _speedup_text(row)  # the first row is the baseline
        times = (milliseconds(row[key]) for key in ("median_ms", "p90_ms", "p99_ms"))
        notes = "; ".join(dict.fromkeys(text for text in (speedup, *row["notes"]) if text))
        table.add_row(str(row["model"]), str(row["batch"]), *times, f"{row['images_per_s']:.3g}", notes)
    return table


def layer_table(layers: Iterable[Mapping[str, Any]]) -> Table:
    """Build the table of the traced time of each layer, dense and slim."""
    table = Table(title="time by layer (traced)", title_justify="left")
    table.add_column("layer", overflow="fold")
    for heading in ("channels out, in", "dense", "slim", "speed-up"):
        table.add_column(heading, justify="right")
    table.add_column("note", justify="right")
    notes = _Notes("no faster because")
    for layer in layers:
        before, after = (", ".join(map(str, layer[f"{which}_channels"])) for which in ("dense", "slim"))
        speedup = f"{layer['dense_ms'] / layer['slim_ms']:.2f}x" if layer["slim_ms"] > 0 else UNKNOWN
        table.add_row(
            layer["name"],
            before if before == after else f"{before} → {after}",
            milliseconds(layer["dense_ms"]),
            milliseconds(layer["slim_ms"]),
            speedup,
            notes.number_of(layer["why"]),
        )
    notes.write_under_(table)
    return table


def group_table(groups: Iterable[Mapping[str, Any]]) -> Table:
    """Build the table of the traced time of each channel group, dense and slim, the slowest first."""
    table = Table(title="time by channel group (traced)", title_justify="left")
    table.add_column("group", overflow="fold")
    for heading in ("layers", "channels", "dense", "slim", "share", "note"):
        table.add_column(heading, justify="right")
    notes = _Notes("no faster because")
    for group in groups:
        before, after = group["dense_width"], group["slim_width"]
        channels = str(before or "") if before == after else f"{before} → {after}"
        table.add_row(
            group["group"],
            str(len(group["layers"])),
            channels,
            milliseconds(group["dense_ms"]),
            milliseconds(group["slim_ms"]),
            f"{group['share']:.0%}",
            notes.number_of(group["why"]),
        )
    notes.write_under_(table, "share: of the time of the slim network")
    return table


class _Notes:
    """Numbered notes under a table; rows with the same note share its number, and a narrow terminal keeps it whole."""

    def __init__(self, opening: str) -> None:
        self._opening, self._numbers = opening, dict[str, int]()

    def number_of(self, text: str) -> str:
        """Return the number of a note, for a cell; empty where there is none."""
        return str(self._numbers.setdefault(text, len(self._numbers) + 1)) if text else ""

    def write_under_(self, table: Table, *lines: str) -> None:
        """Set the caption of a table to `lines` and the notes."""
        notes = [f"{number}: {self._opening} {text}" for text, number in self._numbers.items()]
        table.caption, table.caption_justify = "\n".join([*lines, *notes]) or None, "left"


def _measurement_label(row: Mapping[str, Any]) -> str:
    """Name the backend, precision, batch, device and options of a row; rows of the same label can be compared."""
    options = row.get("options") or ()
    parts = [row.get("backend"), row.get("precision"), f"batch {row.get('batch')}", row.get("device"), *options]
    return ", ".join(str(part) for part in parts if part)


def _accuracy_cells(before: float | None, after: float | None) -> tuple[str, str, str]:
    """Format two accuracies in [0, 1] and their difference in percentage points."""
    cells = [UNKNOWN if value is None else f"{100 * value:.2f} %" for value in (before, after)]
    change = UNKNOWN if before is None or after is None else f"{100 * (after - before):+.2f} points"
    return cells[0], cells[1], change
