"""The two files of a run that are appended to while it goes on: `metrics.jsonl` and `run.log`."""

from __future__ import annotations

import json
import math
import os
from datetime import datetime
from pathlib import Path

from passdeploy.runtime.events import Event, StageFinished, StageStarted, Step, Warned

METRICS, LOG = "metrics.jsonl", "run.log"


class AppendedFile:
    """A file that grows by lines; one that a killed process left unfinished is cut off first."""

    def __init__(self, path: Path) -> None:
        _drop_unfinished_line(path)
        self._stream = path.open("a", encoding="utf-8", errors="backslashreplace")  # of paths that are not UTF-8

    def append(self, line: str) -> None:
        """Write a line, complete when this returns."""
        self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def metrics_line(event: Event) -> str | None:
    """Return the JSON object of a step; None for other events. Infinite and NaN numbers become null."""
    if not isinstance(event, Step):
        return None
    line = {"stage": event.stage, "step": event.done, "total": event.total}
    metrics = {key: x if math.isfinite(x) else None for key, x in event.metrics.items()}
    return json.dumps({**line, **metrics})


def log_line(event: Event) -> str | None:
    """Return the line for the start or end of a stage, or a warning, with the time of now; None for steps."""
    if isinstance(event, Step):
        return None
    return f"{datetime.now().astimezone().isoformat(timespec='seconds')} {_text_of(event)}"


def _text_of(event: StageStarted | StageFinished | Warned) -> str:
    if isinstance(event, StageStarted):
        return f"{event.stage}: started, {event.text}"
    if isinstance(event, StageFinished):
        how = "taken over from before" if event.is_skipped else f"finished in {event.seconds:.1f} s"
        return f"{event.stage}: {how}" + (f", {event.text}" if event.text else "")
    return f"warning: {event.text}"


def _drop_unfinished_line(path: Path) -> None:
    """Cut off an unfinished last line, which a killed process left."""
    if path.is_file():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
