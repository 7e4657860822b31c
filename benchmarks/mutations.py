"""Mutation check of the code that cuts networks: plants faults, one at a time, and shows what finds them.

    python -m benchmarks.mutations [--only NAME,..] [--verify-only] [--jobs 2] [--output FILE]

Every fault of mutation_list.py is planted into a copy of the package. `verify` must then raise an error on one of the
networks of mutation_networks.py, and one of the tests in `TESTS` must fail. Writes benchmarks/results/mutations.json
and mutations.md; faults that are not run keep their earlier results. Exits with 1 if a fault is not found by the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.mutation_list import MUTATIONS, Mutation
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.versions import package_versions

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "mutations.json"
COPIED = ("passdeploy", "tests", "benchmarks", "recipes")
LAST = "tests/slimming/test_random_networks.py"  # takes a minute
LEFT_OUT = "tests/slimming/test_mutations.py"  # fails for every planted fault, since it compares the list with the code
LIMIT_S = 900


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names of faults, separated by commas")
    parser.add_argument("--verify-only", action="store_true", help="do not run the tests")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    chosen = _chosen(options.only)
    results = _earlier_results(options.output)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        true = Path(folder) / "true"
        copy_project(ROOT, true)
        cases = Path(folder) / "cases.pickle"
        prepare_cases(true, cases)
        _require_clean(true, cases, tests_too=not options.verify_only)

        def examine(mutation: Mutation) -> dict[str, Any]:
            return examined(mutation, true, cases, tests_too=not options.verify_only)

        for mutation, found in zip(chosen, pool.map(examine, chosen), strict=True):
            result = results[mutation.name] = {**results.get(mutation.name, {}), **found}
            print(_line(mutation, result), flush=True)
            _write(options.output, results)
    print(_summary(results))
    return 0 if all(result.get("test") for result in results.values()) or options.verify_only else 1


def _chosen(only: str) -> list[Mutation]:
    names = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := set(names) - {mutation.name for mutation in MUTATIONS}:
        raise SystemExit(f"no fault is named {sorted(unknown)[0]!r}")
    return [mutation for mutation in MUTATIONS if not names or mutation.name in names]


# One fault


def copy_project(source: Path, target: Path) -> None:
    """Copy what the checks need, compiled files included."""
    for name in COPIED:
        shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("results", ".*"))
    shutil.copy2(source / "pyproject.toml", target)


def examined(mutation: Mutation, true: Path, cases: Path, *, tests_too: bool) -> dict[str, Any]:
    """Plant a fault into a copy of the project and return what finds it."""
    with tempfile.TemporaryDirectory(dir=true.parent) as folder:
        copy = Path(folder) / "project"
        copy_project(true, copy)
        mutation.plant_(copy / "passdeploy")
        result: dict[str, Any] = {"file": mutation.file, "old": mutation.old, "new": mutation.new}
        start = time.perf_counter()
        finding = verify_finding(copy, cases)
        result |= {"network": None, "error": None, **(finding or {})}
        result["verify_s"] = round(time.perf_counter() - start, 1)
        if tests_too:
            start = time.perf_counter()
            result["test"] = first_failure(copy)
            result["tests_s"] = round(time.perf_counter() - start, 1)
        return result


def prepare_cases(project: Path, cases: Path, networks: Sequence[str] = ()) -> None:
    """Find groups and choose plans with the code of a project; all networks if none are named."""
    _run(project, "-m", "benchmarks.mutation_networks", "prepare", str(cases), *networks, check=True)


def verify_finding(project: Path, cases: Path) -> dict[str, str] | None:
    """Return the first network on which `verify` of a project raises an error, and the error."""
    done = _run(project, "-m", "benchmarks.mutation_networks", "check", str(cases), check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    if Path(answer["package"]).resolve() != (project / "passdeploy").resolve():
        raise RuntimeError(f"imported {answer['package']} instead of the copy with the fault")
    finding: dict[str, str] | None = answer["finding"]
    return finding


def first_failure(project: Path) -> str | None:
    """Run the tests of the slimming code until one fails; return its name."""
    where = _run(project, "-c", "import passdeploy; print(passdeploy.__file__)", check=True).stdout.strip()
    if Path(where).resolve().parent != (project / "passdeploy").resolve():
        raise RuntimeError(f"the tests would import {where} instead of the copy with the fault")
    options = ("-x", "-q", "--tb=no", "-p", "no:cacheprovider")
    try:
        done = _run(project, "-m", "pytest", *options, *_test_files(project))
    except subprocess.TimeoutExpired:
        return f"no end within {LIMIT_S} s"
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if failed is None:
        raise RuntimeError(f"pytest failed without a failing test:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[1]


def _test_files(project: Path) -> list[str]:
    """List the tests of the slimming code; the slowest file comes last."""
    folders = ("tests/slimming", "tests/channels", "tests/grouping")
    files = [f"{folder}/{path.name}" for folder in folders for path in sorted((project / folder).glob("test_*.py"))]
    files = [
        "tests/models/test_cloning.py",
        "tests/models/test_wrappers.py",
        *files,
        "tests/sparsity/test_shrinking.py",
    ]
    return [name for name in files if name not in (LAST, LEFT_OUT)] + [LAST]


def _require_clean(true: Path, cases: Path, *, tests_too: bool) -> None:
    """Stop unless the code without any fault passes."""
    if (finding := verify_finding(true, cases)) is not None:
        raise SystemExit(f"without any fault, verify fails on {finding['network']!r}: {finding['error']}")
    if tests_too and (failure := first_failure(true)) is not None:
        raise SystemExit(f"without any fault, {failure} fails")


def _run(project: Path, *arguments: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=project, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(arguments[:3])} failed:\n{done.stderr[-3000:]}")
    return done


# Results


def _earlier_results(file: Path) -> dict[str, dict[str, Any]]:
    """Read the results of faults that are still planted in the same way."""
    if not file.exists():
        return {}
    earlier = json.loads(file.read_text())["mutations"]
    wanted = {mutation.name: (mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS}
    return {
        name: result
        for name, result in earlier.items()
        if wanted.get(name) == (result["file"], result["old"], result["new"])
    }


def _write(file: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    ordered = {mutation.name: results[mutation.name] for mutation in MUTATIONS if results.get(mutation.name)}
    content = {
        "faults": len(ordered),
        "found_by_verify": sum(result["network"] is not None for result in ordered.values()),
        "found_by_tests": sum(bool(result.get("test")) for result in ordered.values()),
        "versions": package_versions(),
        "mutations": ordered,
    }
    write_atomically(file, json.dumps(content, indent=2) + "\n")
    write_atomically(file.with_suffix(".md"), _table(ordered))


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        "# Mutation check of the slimming code",
        "",
        f"{_summary(results)} Each row is one fault, planted alone. Seconds are wall time on a shared machine, and end "
        "at the first finding. Made by `python -m benchmarks.mutations`.",
        "",
        "| fault | file | found by verify on | found by test | seconds (verify, tests) |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        test = (result.get("test") or "–").removeprefix("tests/").replace("|", "\\|")
        seconds = f"{result['verify_s']:.0f}, {result.get('tests_s', 0):.0f}"
        rows.append(f"| {name} | {result['file']} | {result['network'] or '–'} | `{test}` | {seconds} |")
    return "\n".join(rows) + "\n"


def _summary(results: Mapping[str, Mapping[str, Any]]) -> str:
    by_verify = sum(result["network"] is not None for result in results.values())
    by_tests = sum(bool(result.get("test")) for result in results.values())
    return f"Of {len(results)} faults, verify finds {by_verify} and the tests find {by_tests}."


def _line(mutation: Mutation, result: Mapping[str, Any]) -> str:
    return f"{mutation.name}: verify {result['network'] or 'NOTHING'} ({result['error']}); tests {result.get('test')}"


if __name__ == "__main__":
    sys.exit(main())
