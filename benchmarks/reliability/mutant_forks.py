"""Try mutants: each in a fork of a process that has imported what the tests import from other packages.

python -m benchmarks.reliability.mutant_forks TEST ...      reads requests (JSON) from stdin, answers on stdout
"""

from __future__ import annotations

import ast
import json
import os
import select
import signal
import sys
import time
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from itertools import accumulate
from math import ceil
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

from benchmarks.reliability.mutant_operators import Mutant, mutated
from benchmarks.reliability.mutant_tests import TestMap
from benchmarks.reliability.waiting import WaitingProcess

SECONDS = 10.0  # of processor time of tests for each mutant, by what they take without one
_FIRST = 40  # tests of a mutant, the quickest ones; the others run if these pass
_WAITING = 20  # times the limit of processor time: as long may a process take that waits, or shares its processor
_MEMORY = 16 << 30  # bytes of address space, so that a mutant cannot take all memory


@dataclass(frozen=True)
class Verdict:
    """What the tests said of a mutant."""

    mutant: Mutant
    outcome: str  # found, no end, survived or not run
    test: str = ""  # that found it
    tests: int = 0  # that run the line
    tried: int = 0  # of these, that ran or would have run after the one that found it

    @property
    def is_found(self) -> bool:
        """True if the tests noticed."""
        return self.outcome in ("found", "no end")

    def to_json(self) -> dict[str, Any]:
        """Return JSON values for the results."""
        mutant = self.mutant
        return {
            "file": mutant.file,
            "line": mutant.line,
            "operator": mutant.operator,
            "old": mutant.old,
            "new": mutant.new,
            "outcome": self.outcome,
            "tests": self.tests,
            "tried": self.tried,
        }


class Forks(WaitingProcess):
    """The process whose forks try mutants; a context manager ends it."""

    def __init__(self, root: Path, tests: Sequence[str], grace_s: float = 20.0) -> None:
        """Start the process in the folder of a project; it collects its tests, so that forks need not import much.

        Tests have no end that take four times as long as without a mutant, and `grace_s` more, of processor time.
        """
        self._grace_s = grace_s
        path = os.pathsep.join([str(root), str(Path(__file__).parents[2])])
        super().__init__("benchmarks.reliability.mutant_forks", *tests, folder=root, PYTHONPATH=path)

    def examine(self, mutant: Mutant, tests: TestMap) -> Verdict:
        """Run the tests of a mutant until one fails."""
        every = tests.of(mutant.file, mutant.lines)
        spent = list(accumulate(tests.seconds[test] for test in every))
        tried = every[: max(1, bisect_right(spent, SECONDS))]
        if not every:
            return Verdict(mutant, "not run")
        for part in (tried[:_FIRST], tried[_FIRST:]):
            answer = self.run(part, tests, mutant) if part else {"code": 0}
            if answer["code"] is None:
                return Verdict(mutant, "no end", "", len(every), len(tried))
            if answer["code"] != 0:
                return Verdict(mutant, "found", answer["test"] or "at import", len(every), len(tried))
        return Verdict(mutant, "survived", "", len(every), len(tried))

    def run(self, chosen: Sequence[str], tests: TestMap, mutant: Mutant | None = None) -> dict[str, Any]:
        """Run tests with a mutant; return pytest's exit code, None if it had no end, and the test that failed."""
        files = list(dict.fromkeys(test.partition("::")[0] for test in chosen))  # a file's fixtures are made once
        ordered = sorted(chosen, key=lambda test: files.index(test.partition("::")[0]))
        answer: dict[str, Any] = self.ask(
            tests=ordered,
            limit_s=ceil(self._grace_s + 4 * sum(tests.seconds[test] for test in chosen)),
            place=None if mutant is None else (mutant.file, mutant.place, mutant.choice),
        )
        return answer


def require_clean(forks: Forks, tests: TestMap) -> None:
    """Stop unless the tests pass in a fork and in another order, without any mutant."""
    chosen = list(tests.seconds)[: max(1, bisect_right(list(accumulate(tests.seconds.values())), SECONDS))]
    answer = forks.run(chosen, tests)
    if answer["code"] != 0:
        raise SystemExit(f"without any mutant, the tests end with {answer['code']}: {answer['test']}")


# In the process that forks


def serve(tests: Sequence[str]) -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *tests])
    for name in [name for name, module in sys.modules.items() if _is_own(module) and name != "__main__"]:
        del sys.modules[name]  # each fork imports these anew, one of them with a change
    for line in sys.stdin:
        answers.write(json.dumps(_answer_of_a_fork(json.loads(line))) + "\n")
        answers.flush()


def _is_own(module: ModuleType) -> bool:
    """True for modules of the project, not of packages that are installed in an environment below its folder."""
    file = Path(getattr(module, "__file__", None) or "/")
    return file.is_relative_to(Path().absolute()) and "site-packages" not in file.parts


def _answer_of_a_fork(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a request in a process of its own; the code is None if that had to be stopped, and -1 if it died."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(reader)
        os.setsid()
        _try(request, writer)
    os.close(writer)
    text = b""
    deadline = time.monotonic() + _WAITING * request["limit_s"]
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not (part := os.read(reader, 1 << 16)):
            break
        text += part
    os.close(reader)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    answer: dict[str, Any] = {"code": -1, "test": "the process died"}
    if text:
        answer = json.loads(text)
    elif os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        answer = {"code": None, "test": ""}
    return answer


def _try(request: dict[str, Any], writer: int) -> None:
    """Run the tests in this process, and end it."""
    import resource

    answer: dict[str, Any] = {"code": -1, "test": ""}
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (request["limit_s"], request["limit_s"]))
        if request["place"] is not None:
            sys.meta_path.insert(0, _MutantFinder(*request["place"]))
        failure = _FirstFailure()
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
        answer["code"] = int(pytest.main([*options, *request["tests"]], plugins=[failure]))
        answer["test"] = failure.test
    except BaseException as error:  # a fork must not go on as its parent
        answer["test"] = repr(error)[:200]
    finally:
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)


class _FirstFailure:
    """A plugin of pytest that remembers the test that failed."""

    test = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.test = self.test or report.nodeid


class _MutantFinder(MetaPathFinder):
    """Finds the module of one file, with a change."""

    def __init__(self, file: str, place: int, choice: int) -> None:
        self._path, self._place, self._choice = Path(file), place, choice
        self._module = ".".join(self._path.with_suffix("").parts).removesuffix(".__init__")

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        source = self._path.read_text(encoding="utf-8")
        tree = mutated(source, self._place, self._choice)
        file = str(self._path.absolute())
        return spec_from_file_location(fullname, file, loader=_MutantLoader(fullname, file, tree))


class _MutantLoader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, tree: ast.Module) -> None:
        super().__init__(fullname, path)
        self._tree = tree

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = compile(self._tree, self.path, "exec", dont_inherit=True)
        return code


if __name__ == "__main__":
    serve(sys.argv[1:])
