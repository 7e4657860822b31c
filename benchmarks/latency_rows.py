"""Result rows of `latency.py` on disk, and the measurement of two networks in turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.latency_report import report
from passdeploy.profiling.clock import Clock, HostClock
from passdeploy.profiling.environment import read_environment
from passdeploy.profiling.interleaved import SESSIONS, RunnerBuilder, TimeBudget, build_in_turns, measure_sessions
from passdeploy.profiling.statistics import speedup_over_sessions, summarise_times
from passdeploy.runtime.files import write_atomically

MEASURE = TimeBudget(seconds=4.0)


class Rows:
    """The rows that were measured; each is written to disk at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.all: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """Return the first row that has these values, or None."""
        return next((row for row in self.all if all(row.get(key) == value for key, value in wanted.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, write all rows and the report, and print the row."""
        self.all.append(row)
        document = {"environment": read_environment(threads=int(row.get("threads", 1))), "rows": self.all}
        self._path.parent.mkdir(exist_ok=True)
        write_atomically(self._path, json.dumps(document, indent=1) + "\n")
        write_atomically(self._path.with_suffix(".md"), "\n".join([*report(self.all), ""]))
        print(json.dumps({key: value for key, value in row.items() if key != "widths"}), flush=True)


def measure_pair(
    dense: RunnerBuilder,
    slim: RunnerBuilder,
    budget: TimeBudget = MEASURE,
    *,
    sessions: int = SESSIONS,
    clock: Clock | None = None,
) -> dict[str, Any]:
    """Measure both networks in turns, as `passdeploy profile` does."""
    slow, fast = measure_sessions(build_in_turns(dense, slim), clock or HostClock(), budget, sessions=sessions)
    gained = speedup_over_sessions(slow, fast)
    return {
        "dense_ms": summarise_times(*slow).median_ms,
        "slim_ms": summarise_times(*fast).median_ms,
        "speedup": gained.ratio,
        "speedup_ci": [gained.low, gained.high],
        "sittings": sessions,
    }
