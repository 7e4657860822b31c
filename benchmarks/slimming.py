"""Benchmark of slimming on the model zoos: how many networks are cut, and whether exactly; beside torch-pruning.

    python benchmarks/slimming.py --zoo all

Every network runs in a process of its own, on one thread, with random weights. Half of the channels of every
prunable group are removed, chosen at random, and the slim network is compared with the masked one. torch-pruning cuts
the same share of the same network. Results are kept in a JSON file, and a second call measures the missing ones.

Rules:

* `exact`: the outputs of the slim and of the masked network differ by at most 1e-5 of the largest output, in
  float32; or, where float32 itself is too coarse for a deep network without norms, by at most 1e-9 in float64.
* Cutting must change the outputs, or the comparison would show nothing: a network whose outputs change by less than a
  hundred times the tolerance is `unjudged`. A network without prunable groups is `uncut`.
* Detectors: random weights rank all boxes alike, so rounding would decide which boxes are kept. Therefore the outputs
  of every head are compared, before boxes are chosen; those of the box heads on boxes that the masked network proposed.
* Times are CPU seconds of one thread, which other processes hardly change. Work that takes less than some seconds is
  timed up to three times and the least is taken, for both libraries, since single times differ by up to a half. The
  limit holds for finding groups and slimming; checks afterwards may take five times as long.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.slimming_jobs import run_all
from benchmarks.slimming_report import ROUNDED, details, markdown, summary_table
from benchmarks.zoo import ZOOS, entries
from passdeploy.runtime.files import write_atomically


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--zoo", type=click.Choice([*ZOOS, "all"]), default="all", show_default=True)
@click.option("--only", "pattern", default="*", help="Networks whose name matches, as in a shell.")
@click.option("--ours-only", is_flag=True, help="Leave torch-pruning out.")
@click.option("--workers", default=1, show_default=True, help="Networks at a time.")
@click.option("--limit-s", default=60.0, show_default=True, help="CPU seconds for groups and slimming of one network.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path(__file__).parent / "results" / "slimming.json",
    help="Where results are kept.",
)
@click.option("--fresh", is_flag=True, help="Measure again what the file has already.")
def main(zoo: str, pattern: str, ours_only: bool, workers: int, limit_s: float, out: Path, fresh: bool) -> None:
    """Measure the networks that have no result yet; the module docstring describes how."""
    console = Console(width=max(Console().width, 180))
    document: dict[str, Any] = {"models": {}, "rounded": {}}
    if out.exists():
        document = json.loads(out.read_text())
    sides = ["ours"] if ours_only else ["ours", "torch_pruning"]
    chosen = [entry for entry in entries(zoo) if fnmatchcase(entry.name, pattern)]
    jobs = [
        (entry, side)
        for entry in chosen
        for side in sides
        if fresh or side not in document["models"].get(entry.key, {})
    ]
    for entry in chosen:
        if entry.zoo == "torchvision" and entry.name in ROUNDED:
            measured = document["rounded"].get(entry.key, {})
            jobs += [(entry, f"{side}_rounded") for side in sides if fresh or f"{side}_rounded" not in measured]
    commit = _describe_commit()
    document["environment"] = _environment() | {"limit_s": limit_s, "workers": workers}

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "torchvision", "timm"])
    for number, job in enumerate(run_all(jobs, workers=workers, limit_s=limit_s), start=1):
        table = document["rounded" if job.side.endswith("_rounded") else "models"]
        table.setdefault(job.entry.key, {})[job.side] = job.result | {"commit": commit}
        write_atomically(out, json.dumps(document, indent=1) + "\n")
        error = job.result.get("rel_error")
        outcome = job.result.get("error") or ("" if error is None else f"{error:.1e}")
        console.print(
            f"{number}/{len(jobs)} {job.entry.key} {job.side} {job.result.get('status')} {outcome}", markup=False
        )
    shown = {entry.key: document["models"][entry.key] for entry in chosen if entry.key in document["models"]}
    console.print(details(shown))
    console.print(summary_table(document["models"], document["rounded"]))
    write_atomically(out.with_suffix(".md"), markdown(document))
    console.print(f"wrote {out}")


def _describe_commit() -> str:
    """Return the hash of the commit that is checked out, with a plus if files were changed."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _environment() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("torch", "torchvision", "timm", "torch-pruning"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return {"versions": found, "threads": 1}


if __name__ == "__main__":
    main()
