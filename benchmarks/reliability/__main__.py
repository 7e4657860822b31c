"""Print and write the counts of all rows: `benchmarks/results/reliability.json` and `.md`.

    python -m benchmarks.reliability                           every row, with the numbers of its goal: hours
    python -m benchmarks.reliability recipes --count 1000      one row with fewer trials

Rows that are not asked for stay in the results as they are. The exit code is 1 if a trial ended as it must not;
of mutants, if too many survive.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

from passdeploy.errors import percent
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.versions import package_versions

RESULTS = Path(__file__).parents[1] / "results"
ROWS = {
    "kills": "SIGKILL, SIGTERM or SIGINT at random moments over all stages, then resume: bit-identical",
    "published": "SIGKILL in `export`, `profile` and latency tables: what was there is whole, the next try ends well",
    "recipes": "fuzzed recipes: no traceback, at most three lines, right exit code",
    "artifacts": "corrupted artifacts: refused in a short error, none accepted; older formats are read",
    "hostile": "hostile files and names: a canary never touched",
    "onnx_files": "fuzzed ONNX files into `profile`, bundles and the linter: an answer or a refusal",
    "writes": "ENOSPC and EIO at every write of a short run: the previous state loads, resume is bit-identical",
    "races": "two runs racing for one run or one folder: the second names the first",
    "ranks": "two gloo ranks, one killed: the other ends with one clear error, resume works",
    "workers": "worker counts 0, 1, 2, 8 and a repeated run: identical plan and weights",
    "memory": "memory over 1,000 training steps, 100 ONNX Runtime sessions, 50 searches for groups: below 2 % growth",
    "coverage": "line coverage of plans, slimming, channel groups and the rules of operations: 95 % of each package",
    "mutants": "random mutants of plans, slimming and the rules of operations: the tests find at least 80 %",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all, if left out")
    parser.add_argument("--count", type=int, help="trials of each row; the goal of the row, if left out")
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability.json", help="JSON file; Markdown beside it")
    options = parser.parse_args()
    if unknown := sorted(set(options.rows) - ROWS.keys()):
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    document: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": {}}
    is_good = True
    for name in options.rows or ROWS:
        module = import_module(f"benchmarks.reliability.{name}")
        tally = module.measure(options.count or module.GOAL, options.seed)
        for failure in tally.failures:
            print(f"  {failure}")
        document["rows"][name] = {
            "goal": module.GOAL,
            **tally.to_json(),
            "seed": options.seed,
            "date": date.today().isoformat(),
            "versions": package_versions(),
            "machine": {"system": platform.platform(), "processors": os.cpu_count()},
        }
        print(f"{name:<12} {tally.good:,} of {tally.trials:,}  {dict(tally.outcomes)}", flush=True)
        is_good = is_good and tally.is_good
        write_atomically(options.out, json.dumps(document, indent=1) + "\n")
        write_atomically(options.out.with_suffix(".md"), markdown(document))
    return 0 if is_good else 1


def markdown(document: dict[str, Any]) -> str:
    """Write the results as a table."""
    lines = [
        "# Reliability: what happened when things went wrong",
        "",
        "Written by `python -m benchmarks.reliability`; each row can be run alone. A trial is good if it ended as",
        "its row says. Fewer trials than the goal means that so many have been run so far.",
        "",
        "| row | good | trials | goal | ended with |",
        "|---|---:|---:|---:|---|",
    ]
    rows = {name: document["rows"][name] for name in ROWS if name in document["rows"]}
    for name, row in rows.items():
        outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in row["outcomes"].items())
        goal = "all" if name == "writes" else f"{row['goal']:,}"
        good = f"{row['good']:,}" + (f" ({percent(row['good'] / row['trials'])})" if "least" in row else "")
        lines.append(f"| {ROWS[name]} | {good} | {row['trials']:,} | {goal} | {outcomes} |")
    failures = [
        f"- {name}: {clean(failure)}"
        for name, row in rows.items()
        if "least" not in row or row["good"] < row["least"] * row["trials"]
        for failure in row["failures"]
    ]
    lines += ["", "Failures:", "", *failures] if failures else []
    versions = {f"{key} {row['versions'][key]}" for row in rows.values() for key in ("python", "torch", "onnx")}
    lines += [
        "",
        f"Versions: {', '.join(sorted(versions))}; all, with the seeds, are in `reliability.json`.",
        "",
    ]
    return "\n".join(lines)


def clean(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
