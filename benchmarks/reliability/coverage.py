"""Line coverage of what decides over right and wrong cuts: plans, slimming, channel groups and the rules of operations.

The tests of these packages run once under `coverage` (extra dev), a third slower than without it, which is why this is
a row of its own and no part of `make test`. A package is good with 95 % of its lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.reliability.tally import Tally

GOAL = 4
LEAST = 0.95
ROOT = Path(__file__).parents[2]
PACKAGES = {  # package -> the tests of it
    "passdeploy/channels": (
        "tests/channels",
        "tests/test_fastest_widths.py",
        "tests/latency/test_knapsack.py",
        "tests/latency/test_blocks.py",
    ),
    "passdeploy/tracing/rules": ("tests/tracing",),
    "passdeploy/grouping": ("tests/grouping",),
    "passdeploy/slimming": ("tests/slimming",),
}


def measure(count: int = GOAL, seed: int = 0) -> Tally:
    """Run the tests of all packages and count the lines of the first `count`; nothing is random."""
    tally = Tally()
    files = covered_lines()
    for package in list(PACKAGES)[:count]:
        own = {name: file for name, file in files.items() if name.startswith(package + "/")}
        lines = sum(file["summary"]["num_statements"] for file in own.values())
        share = sum(file["summary"]["covered_lines"] for file in own.values()) / lines
        problem = None if share >= LEAST else f"{share:.1%} of the lines"
        tally.add(package, problem, trial=package)
        missing = {name: file["missing_lines"] for name, file in own.items() if file["missing_lines"]}
        tally.facts[package] = {"lines": lines, "covered": round(share, 4), "missing": missing}
    return tally


def covered_lines() -> dict[str, Any]:
    """Run the tests, and return what `coverage json` says of each file."""
    with TemporaryDirectory() as temporary:
        data, report = Path(temporary) / "data", Path(temporary) / "report.json"
        coverage = [sys.executable, "-m", "coverage"]
        where = ["--data-file", str(data)]
        pytest = [
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *(test for tests in PACKAGES.values() for test in tests),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        tests = [*coverage, "run", *where, "--source", ",".join(PACKAGES), *pytest]
        if (code := subprocess.run(tests, cwd=ROOT, env=environment, check=False).returncode) != 0:
            raise SystemExit(f"the tests ended with {code}")
        subprocess.run([*coverage, "json", *where, "-q", "-o", str(report)], cwd=ROOT, check=True)
        files: dict[str, Any] = json.loads(report.read_text())["files"]
        return files
