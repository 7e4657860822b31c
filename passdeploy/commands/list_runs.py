"""The runs in a folder with the state they are in, and everything about one of them; nothing here needs torch."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from passdeploy.display.listing import Listing
from passdeploy.display.units import relative_change
from passdeploy.errors import UNKNOWN, PassDeployError, percent
from passdeploy.report.run_facts import RunFacts, read_run
from passdeploy.report.verdict import main_row
from passdeploy.runs.folder import STATE, RunFolder
from passdeploy.runs.numbering import MANIFEST, is_being_written, link_target, list_runs
from passdeploy.runtime.intervals import is_measurable

_NUMBERS = ("top1", "macs", "params")
STAGES = ("dense", "learn", "time", "slim", "finetune")


def find_runs(out: Path) -> list[dict[str, Any]]:
    """Describe every run in `out`, the newest last.

    Returns:
        For each: `name`, `state` ("finished", "running", "running, after STAGE", "stopped early", "stopped after
        STAGE" or "damaged"), `why` it is damaged, `is_latest`, `changed` (a time) and, where it is finished, the
        numbers of its summary, its speed-up and the interval of that.
    """
    latest = link_target(out / "latest")
    found = list[dict[str, Any]]()
    for path in list_runs(out):
        with suppress(FileNotFoundError):  # a run that failed early, which has been deleted since
            found.append(_describe(path, path.name == latest))
    return sorted(found, key=lambda run: str(run["changed"]))


def finished_runs(out: Path) -> list[RunFacts]:
    """Read every finished run in `out`, in the order of their names; damaged and unfinished ones are left out."""
    facts = []
    for path in list_runs(out):
        try:
            folder = RunFolder.open(path)
            if folder.has("summary.json"):
                facts.append(read_run(folder))
        except PassDeployError:
            continue
    return facts


def runs_table(runs: list[dict[str, Any]]) -> Listing:
    """Build the table of runs."""
    rows = []
    for run in runs:
        name = f"{run['name']}{' *' if run['is_latest'] else ''}"
        if run["state"] != "finished":
            rows.append((name, run["state"], "", "", "", run["changed"][:16].replace("T", " ")))
            continue
        speedup = _speedup_text(run)
        top1 = f"{percent(run['dense_top1'], 1)} → {percent(run['slim_top1'], 1)}"
        macs = relative_change(run["dense_macs"], run["slim_macs"])
        rows.append((name, "finished", top1, macs, speedup, run["changed"][:16].replace("T", " ")))
    notes = ["*: runs/latest"] if any(run["is_latest"] for run in runs) else []
    notes += [f"{run['name']}: {run['why']}" for run in runs if "why" in run]
    headings = ("run", "state", "top-1", "MACs", "speed", "changed")
    return Listing(headings, tuple(rows), notes=tuple(notes), left=frozenset({0, 1, 5}))


def _speedup_text(run: dict[str, Any]) -> str:
    """Write the speed-up of a run, or that there is none that can be measured."""
    if not run["speedup"]:
        return UNKNOWN
    interval = run["speedup_ci"]
    return "not measurable" if interval and not is_measurable(*interval) else f"{run['speedup']:.2f}x"


def _describe(path: Path, is_latest: bool) -> dict[str, Any]:
    changed = datetime.fromtimestamp((path / MANIFEST).stat().st_mtime).astimezone()
    run: dict[str, Any] = {
        "name": path.name,
        "is_latest": is_latest,
        "changed": changed.isoformat(timespec="seconds"),
    }
    try:
        folder = RunFolder.open(path)
        if not folder.has("summary.json"):
            return {**run, "state": _unfinished(path)}
        facts = read_run(folder)
    except PassDeployError as error:
        return {**run, "state": "damaged", "why": str(error).splitlines()[0]}
    row = main_row(facts)
    return {
        **run,
        "state": "finished",
        **{
            f"{which}_{key}": facts.summary[which][key]
            for which in ("dense", "slim")
            for key in ("top1", "macs", "params")
        },
        "speedup": row["speedup"] if row else None,
        "speedup_ci": row.get("speedup_ci") if row else None,
    }


def _unfinished(path: Path) -> str:
    """Say after which stage a run stopped, or which one another process has finished."""
    try:
        done = json.loads((path / STATE).read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError):
        done = {}
    finished = [stage for stage in STAGES if stage in done]
    if is_being_written(path):
        return f"running, after {finished[-1]}" if finished else "running"
    return f"stopped after {finished[-1]}" if finished else "stopped early"
