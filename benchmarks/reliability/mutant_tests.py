"""Which tests run which lines: the tests of `coverage.py`, recorded once with a context for each test.

As a plugin of pytest (`-p benchmarks.reliability.mutant_tests`, under `coverage run`) this module names the context.
What a fixture of several tests runs belongs to all tests that use it, not to the first one alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import pytest
from coverage import Coverage

_FIXTURE = "fixture "  # context of a fixture that several tests share; that of a test is its node id
_TIMES = "PASSDEPLOY_TEST_TIMES"  # environment variable: where the plugin writes what it saw of the tests


@dataclass
class TestMap:
    """The tests that run a line, and how long they take."""

    __test__ = False  # no class of tests

    seconds: dict[str, float]  # node id -> processor time, with fixtures and the recording of lines; quickest first
    by_line: dict[str, dict[int, frozenset[str]]]  # file -> line -> node ids; an empty one: it runs at import

    def of(self, file: str, lines: Sequence[int]) -> list[str]:
        """List the tests that run any of these lines, quickest first; all tests, where one or all run at import."""
        own = self.by_line.get(file, {})
        found = frozenset[str]().union(*(own.get(line, frozenset()) for line in lines))
        is_import = not lines or "" in found
        return [test for test in self.seconds if is_import or test in found]


def record_tests(root: Path, source: Sequence[str], tests: Sequence[str], ignored: Sequence[str] = ()) -> TestMap:
    """Run tests of a project under `coverage`; lines are those of the folders `source`.

    Raises:
        SystemExit: a test failed.
    """
    with TemporaryDirectory() as temporary:
        data, report, times = (Path(temporary) / name for name in ("data", "report.json", "times.json"))
        coverage = [sys.executable, "-m", "coverage"]
        options = [
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "-p",
            __name__,
            *(f"--ignore={name}" for name in ignored),
        ]
        path = os.pathsep.join([str(root), str(Path(__file__).parents[2])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", _TIMES: str(times)}
        run = [
            *coverage,
            "run",
            "--data-file",
            str(data),
            "--source",
            ",".join(source),
            "-m",
            "pytest",
            *options,
            *tests,
        ]
        if (code := subprocess.run(run, cwd=root, env=environment, check=False).returncode) != 0:
            raise SystemExit(f"the tests ended with {code}")
        to_json = [*coverage, "json", "--data-file", str(data), "-q", "--show-contexts", "-o", str(report)]
        subprocess.run(to_json, cwd=root, env=environment, check=True)
        return _read(json.loads(times.read_text()), json.loads(report.read_text())["files"])


def _read(times: dict[str, Any], files: dict[str, Any]) -> TestMap:
    """Put the times and the lines together."""
    seconds = {test: float(seen["seconds"]) for test, seen in times.items()}
    users = defaultdict[str, set[str]](set, {"": {""}})
    for test, seen in times.items():
        users[test].add(test)
        for fixture in seen["fixtures"]:
            users[_FIXTURE + fixture].add(test)
    by_line = {
        name: {
            int(line): frozenset(test for context in contexts for test in users.get(context, ()))
            for line, contexts in file["contexts"].items()
        }
        for name, file in files.items()
    }
    return TestMap(dict(sorted(seconds.items(), key=lambda item: item[1])), by_line)


# The plugin


@dataclass
class _Seen:
    """What the plugin saw of the tests."""

    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    running: str = ""
    caches: list[Any] = field(default_factory=list)  # functions of the package that remember their results


_SEEN = _Seen()


def _switch(context: str) -> None:
    if (coverage := Coverage.current()) is not None:
        coverage.switch_context(context)


def pytest_collection_finish() -> None:
    """List the functions with a cache: without it, every test runs their lines, not the first one alone."""
    modules = [module for name, module in sys.modules.items() if name.startswith("passdeploy")]
    values = [value for module in modules for value in vars(module).values()]
    _SEEN.caches = [value for value in values if hasattr(value, "cache_clear")]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Name the context of a test."""
    _SEEN.running = item.nodeid
    _SEEN.tests[item.nodeid] = {"seconds": 0.0, "fixtures": list(getattr(item, "fixturenames", ()))}
    for cached in _SEEN.caches:
        cached.cache_clear()
    _switch(item.nodeid)
    started = process_time()
    yield
    _SEEN.tests[item.nodeid]["seconds"] = process_time() - started
    _switch("")


@pytest.hookimpl(hookwrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
    """Name the context of a fixture that several tests share."""
    is_shared = fixturedef.scope != "function"
    if is_shared:
        _switch(_FIXTURE + fixturedef.argname)
    yield
    if is_shared:
        _switch(_SEEN.running)


def pytest_sessionfinish() -> None:
    """Write what was seen."""
    if path := os.environ.get(_TIMES):
        Path(path).write_text(json.dumps(_SEEN.tests))
