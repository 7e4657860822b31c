"""The table of `passdeploy bench`: every format and precision of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from passdeploy.display.listing import Footnotes, Listing
from passdeploy.display.tables import notes_of, speedup_text, with_one_busy_note
from passdeploy.display.units import latency, megabytes
from passdeploy.errors import UNKNOWN, percent


def bench_table(document: Mapping[str, Any]) -> Listing:
    """Build the table of a `bench.json`, one format and precision a row; what was skipped is below it."""
    notes, rows = Footnotes(), []
    for row in with_one_busy_note(document["rows"]):
        rows.append(
            (
                str(row["format"]),
                str(row["precision"]),
                megabytes(row["size_bytes"]),
                percent(row["top1"], 2),
                UNKNOWN if row["median_ms"] is None else latency(row).replace(" ms", ""),
                UNKNOWN if row["speedup"] is None else speedup_text(row, is_short=True),
                notes.numbers_of(notes_of({**row, "threads": document["threads"]})),
            )
        )
    images = sorted({row["images"] for row in document["rows"] if row["images"]})
    threads = document["threads"]
    place = f"{threads} CPU thread{'s' if threads > 1 else ''}" if document["device"] == "cpu" else document["device"]
    under = [
        f"batch {document['batch']}, {place}; speed-up: against the dense network in fp32 in the same format, with its "
        "95 % interval",
        f"top-1 on {', '.join(f'{count:,}' for count in images)} images" if images else "top-1 was not counted",
        *notes.lines(),
    ]
    reasons: dict[str, list[str]] = {}
    for one in document["skipped"]:
        reasons.setdefault(str(one["reason"]), []).append(f"{one['format']} {one['precision']}")
    under += [f"skipped {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    headings = ("format", "precision", "size", "top-1", "median ms", "speed-up", "note")
    return Listing(headings, tuple(rows), notes=tuple(under), left=frozenset({0, 1}))
