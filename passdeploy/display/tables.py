"""Tables of results: dense against slim, latencies, layers, groups, sweeps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from passdeploy.display.listing import Footnotes, Listing
from passdeploy.display.units import latency, milliseconds, quantity, relative_change, three_digits
from passdeploy.errors import UNKNOWN, percent
from passdeploy.runtime.intervals import is_measurable

NO_DIFFERENCE = "no measurable difference"
_BUSY = re.compile(r"disturbed: other processes kept ([\d.]+) cores busy")
_LONG_SETTING = 20  # characters; next to a longer one there is less room for words
_ABOUT_INTERVALS = (
    "±: 95 % interval of the median; (a–b): that of the speed-up, a mean of ratios of calls in turns, so not quite the "
    "ratio of the medians"
)


def sweep_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Describe the rows of a `--sweep-round`, one a line, and the best one in the last line."""
    lines, reached = [], [row for row in rows if "refused" not in row]
    for row in rows:
        if "refused" in row:
            lines.append(f"multiples of {row['round_to']:>3}: {row['refused']}")
        else:
            lines.append(
                f"multiples of {row['round_to']:>3}: {milliseconds(row['slim_ms'])} ({percent(row['achieved'])} of "
                f"dense), keeps {percent(row['kept'])} of the score"
            )
    if reached:
        best = max(reached, key=lambda row: row["kept"])
        lines.append(f"best: prune.round_to={best['round_to']}, which keeps the most in that time")
    return lines


def summary_table(summary: Mapping[str, Any], profile_rows: Iterable[Mapping[str, Any]] = ()) -> Listing:
    """Build the table of dense against slim: accuracy and size of a run, and latency where it was measured.

    Args:
        summary: content of `summary.json`; a number that is missing or null shows as a dash.
        profile_rows: the `rows` of `profile.json`; a slim row is paired with the dense row of the same backend,
            precision, batch, device and options.
    """
    dense, slim = summary.get("dense") or {}, summary.get("slim") or {}
    rows: list[tuple[str, ...]] = [("top-1", *_accuracy_cells(dense.get("top1"), slim.get("top1")))]
    for label, key in (("parameters", "params"), ("MACs", "macs")):
        before, after = dense.get(key), slim.get(key)
        rows.append((label, quantity(before), quantity(after), relative_change(before, after)))
    notes = Footnotes()
    timed, lines = latency_rows(profile_rows, notes)
    rows += timed
    has_notes = bool(notes.lines())
    table_rows = tuple((*row, "")[:5] if has_notes else row[:4] for row in rows)
    headings = ("", "dense", "slim", "change", *(["note"] if has_notes else []))
    return Listing(headings, table_rows, str(summary.get("model") or ""), (*lines, *notes.lines()))


def latency_rows(
    profile_rows: Iterable[Mapping[str, Any]], notes: Footnotes
) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Build a row of the latency before and after for every setting, and the lines that hold for all of them.

    Args:
        profile_rows: the `rows` of `profile.json`.
        notes: takes the reasons why two networks could not be told apart, and what disturbed a measurement.

    Returns:
        Rows of five cells: setting, dense, slim, change, numbers of notes; and the lines to set under the table.
    """
    measured = with_one_busy_note(profile_rows)
    shared = [key for key in ("device", "options") if len({str(row.get(key)) for row in measured}) == 1]
    dense_rows = {_setting_of(row, shared): row for row in measured if row["model"] == "dense"}
    slim_rows = {_setting_of(row, shared): row for row in measured if row["model"] == "slim"}
    cells: list[tuple[str, ...]] = []
    is_short = max(map(len, [*dense_rows, *slim_rows]), default=0) > _LONG_SETTING
    for label in dict.fromkeys([*dense_rows, *slim_rows]):
        before, after = dense_rows.get(label, {}), slim_rows.get(label, {})
        numbers = notes.numbers_of(notes_of(after))
        cells.append((label, latency(before), latency(after), speedup_text(after, is_short=is_short), numbers))
    if not measured:
        return cells, ()
    where = [str(measured[0]["device"])] if measured[0].get("device") and "device" in shared else []
    where += [", ".join(measured[0]["options"])] if measured[0].get("options") and "options" in shared else []
    if threads := max(int(row.get("threads") or 0) for row in measured):
        where.append(f"{threads} CPU thread{'s' if threads > 1 else ''}")
    lines = [f"latency: median on {', '.join(where)}"] if where else []
    if any(row.get("ci95_rel") is not None for row in measured):
        lines.append(_ABOUT_INTERVALS)
    return cells, tuple(lines)


def with_one_busy_note(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Give all rows that other processes disturbed the same note, with the most cores that these kept busy."""
    listed = list(rows)
    found = [match for row in listed for note in row.get("notes") or () if (match := _BUSY.fullmatch(note))]
    most = max((match[1] for match in found), key=float, default="")

    def shared(note: str) -> str:
        return f"disturbed: other processes kept up to {most} cores busy" if _BUSY.fullmatch(note) else note

    return [{**row, "notes": [shared(note) for note in row.get("notes") or ()]} for row in listed]


def notes_of(row: Mapping[str, Any]) -> list[str]:
    """Return the notes of a row, the one that explains why there is no measurable difference with what to do."""
    noted = [str(text) for text in row.get("notes") or ()]
    is_disturbed = any(text.startswith(("disturbed", "throttled", "unstable")) for text in noted)
    texts = [text for text in noted if text != NO_DIFFERENCE and not text.startswith("unstable")]  # ± says that
    interval = row.get("speedup_ci")
    if not interval or not row.get("speedup") or is_measurable(*interval):
        return texts
    threads = row.get("threads") or 1
    if is_disturbed:
        advice = "try --threads 1" if threads > 1 else "measure again when it is idle, or longer: --seconds 20"
        why = "; ".join(texts) or "the calls took very different times"
        return [f"{NO_DIFFERENCE} on a busy machine ({why}): {advice}"]
    low, high = interval
    text = f"{NO_DIFFERENCE}: {low:.2f} to {high:.2f} times as fast, 1 is within reach; --seconds 20 narrows it"
    return [text, *texts]


def speedup_text(row: Mapping[str, Any], *, is_short: bool = False) -> str:
    """Describe the speed-up of a row with its interval, or say that there is no measurable difference.

    Args:
        row: of `profile.json`.
        is_short: write `1.25x (1.20–1.30)` and `not measurable`, where a column has little room.
    """
    speedup, interval = row.get("speedup"), row.get("speedup_ci")
    if not speedup:
        return UNKNOWN
    if interval and not is_measurable(*interval):
        return "not measurable" if is_short else NO_DIFFERENCE
    if is_short:
        return f"{speedup:.2f}x" + (f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else "")
    words = f"{speedup:.2f}x faster" if speedup >= 1 else f"{1 / speedup:.2f}x slower"
    if not interval:
        return words
    low, high = interval if speedup >= 1 else (1 / interval[1], 1 / interval[0])
    return f"{words} ({low:.2f}–{high:.2f})"


def profile_table(rows: Iterable[Mapping[str, Any]]) -> Listing:
    """Build a table of the rows of a profile: batch, latencies, images per second and speed-up."""
    notes, cells, measured = Footnotes(), [], with_one_busy_note(rows)
    names = {str(row["model"]) for row in measured}
    are_unique = len({PurePath(name).name for name in names}) == len(names)
    for row in measured:
        low, high = row["speedup_ci"]
        is_baseline = low == high == 1  # the first file
        tails = [three_digits(row[key]) if row[key] is not None else UNKNOWN for key in ("p90_ms", "p99_ms")]
        cells.append(
            (
                PurePath(str(row["model"])).name if are_unique else str(row["model"]),
                str(row["batch"]),
                latency(row).replace(" ms", ""),
                ", ".join(tails),
                three_digits(row["images_per_s"]),
                "" if is_baseline else speedup_text(row, is_short=True),
                notes.numbers_of(row["notes"] if is_baseline else notes_of(row)),
            )
        )
    headings = ("model", "batch", "median ms", "p90, p99", "images/s", "speed-up", "note")
    return Listing(headings, tuple(cells), notes=(_ABOUT_INTERVALS, *notes.lines()))


def layer_table(layers: Sequence[Mapping[str, Any]], top: int | None = None, place: str = "") -> Listing:
    """Build the table of the traced time of each layer, dense and slim, in the order of a call.

    Args:
        layers: of the document of `profile --layers`.
        top: show only so many layers, those that take longest in the slim network; None: all.
        place: backend and batch size that they were traced in.
    """
    notes, shown = Footnotes(), _slowest(layers, top)
    rows = []
    for layer in shown:
        speedup = f"{layer['dense_ms'] / layer['slim_ms']:.2f}x" if layer["slim_ms"] > 0 else UNKNOWN
        rows.append(
            (
                layer["name"],
                layer_channels(layer),
                three_digits(layer["dense_ms"]),
                three_digits(layer["slim_ms"]),
                speedup,
                notes.number_of(layer["why"] and f"no faster because {layer['why']}"),
            )
        )
    headings = ("layer", "channels out×in", "dense ms", "slim ms", "speed-up", "note")
    return Listing(
        headings,
        tuple(rows),
        f"time by layer (traced{place and f' in {place}'})",
        (*_left_out(layers, shown), *notes.lines()),
    )


def layer_channels(layer: Mapping[str, Any]) -> str:
    """Name the output and input channels of a layer, dense and slim where these differ: `64×64 → 24×64`."""
    before, after = ("×".join(map(str, layer[f"{which}_channels"])) for which in ("dense", "slim"))
    after = after or (before and "gone")  # with its block
    return before if before == after else f"{before} → {after}"


def group_table(groups: Sequence[Mapping[str, Any]], top: int | None = None) -> Listing:
    """Build the table of the traced time of each channel group, dense and slim, the slowest first."""
    notes, shown = Footnotes(), _slowest(groups, top)
    rows = []
    for group in shown:
        before, after = group["dense_width"], group["slim_width"]
        rows.append(
            (
                group["group"],
                str(len(group["layers"])),
                str(before or "") if before == after else f"{before} → {after or 'gone'}",
                three_digits(group["dense_ms"]),
                three_digits(group["slim_ms"]),
                percent(group["share"], 0),
                notes.number_of(group["why"] and f"no faster because {group['why']}"),
            )
        )
    headings = ("group", "layers", "channels", "dense ms", "slim ms", "share", "note")
    under = ("share: of the time of the slim network", *_left_out(groups, shown), *notes.lines())
    return Listing(headings, tuple(rows), "time by channel group (traced)", under)


def _slowest(rows: Sequence[Mapping[str, Any]], top: int | None) -> list[Mapping[str, Any]]:
    """Return the rows that take longest in the slim network, in the order that they had."""
    if top is None or top >= len(rows):
        return list(rows)
    longest = sorted(range(len(rows)), key=lambda index: -float(rows[index]["slim_ms"]))[:top]
    return [rows[index] for index in sorted(longest)]


def _left_out(rows: Sequence[Mapping[str, Any]], shown: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Say how many rows are not shown, and how much of the time they take; nothing where all are."""
    if len(shown) == len(rows):
        return ()
    total = sum(float(row["slim_ms"]) for row in rows)
    rest = total - sum(float(row["slim_ms"]) for row in shown)
    return (f"{len(rows) - len(shown)} more take {percent(rest / total, 0)} of the time together (--top, --csv)",)


def _setting_of(row: Mapping[str, Any], shared: Sequence[str]) -> str:
    """Name what a row was measured with, except what all rows share; rows of one setting can be compared."""
    parts = [row.get("backend"), row.get("precision"), f"batch {row.get('batch')}"]
    parts += [row.get("device")] if "device" not in shared else []
    parts += list(row.get("options") or ()) if "options" not in shared else []
    return ", ".join(str(part) for part in parts if part)


def _accuracy_cells(before: float | None, after: float | None) -> tuple[str, str, str]:
    """Format two accuracies in [0, 1] and their difference in percentage points."""
    change = UNKNOWN if before is None or after is None else f"{100 * (after - before):+.2f} points"
    return percent(before, 2), percent(after, 2), change
