"""Commands of passdeploy in processes of their own that start at once, to be killed at any moment.

One process imports everything and waits; each command runs in a fork of it. A process of its own for each command would
spend some seconds on imports. The waiting process computes nothing, since a fork cannot use the threads of its parent.

    python -m benchmarks.reliability.forked [MODULE ...]      reads requests (JSON) from stdin, answers on stdout
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.reliability.waiting import WaitingProcess

ROOT = Path(__file__).parents[2]


class Forked(WaitingProcess):
    """The waiting process; a context manager ends it."""

    def __init__(self, *imported: str) -> None:
        """Start the process; it imports these modules beside those of `passdeploy prune`."""
        module = "benchmarks.reliability.forked"
        super().__init__(module, *imported, folder=ROOT, PYTHONPATH=str(ROOT), NO_COLOR="1")

    def start(self, arguments: list[str], log: Path, **environment: str) -> Command:
        """Start a command; what it prints goes to `log`, which is written anew."""
        pid = self.ask(start=arguments, log=str(log), environment=environment)
        return Command(self, int(pid), log)


@contextmanager
def lent(forked: Forked | None) -> Iterator[Forked]:
    """Use the process that waits already, or start one for the block."""
    if forked is not None:
        yield forked
        return
    with Forked() as started:
        yield started


class Command:
    """A command that was started."""

    def __init__(self, forked: Forked, pid: int, log: Path) -> None:
        self._forked, self.pid, self._log = forked, pid, log
        self._status: int | None = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """Return the exit code, negative after a signal; None while it runs."""
        if self._status is None:
            self._status = self._forked.ask(poll=self.pid)
        return self._status

    def wait(self) -> int:
        """Wait for the end, and return the exit code."""
        if self._status is None:
            self._status = int(self._forked.ask(wait=self.pid))
        return self._status

    @property
    def text(self) -> str:
        """What it printed."""
        return self._log.read_text(errors="replace")


def serve() -> None:
    """Answer requests until stdin ends."""
    import torch

    import passdeploy.commands.prune
    import passdeploy.report.write  # noqa: F401
    from benchmarks.reliability.tiny import shortened
    from passdeploy.cli import main

    for module in sys.argv[1:]:
        import_module(module)
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: int | None = os.fork()
            if answer == 0:
                _run(main, request, shortened)
        else:
            pid, status = os.waitpid(request.get("wait") or request["poll"], 0 if "wait" in request else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run(main: Any, request: dict[str, Any], shortened: Callable[[], AbstractContextManager[None]]) -> None:
    """Run a command in this process, and end it."""
    log = os.open(request["log"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ |= request["environment"]
    code: Any = 1
    try:
        with shortened():
            main(request["start"])
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # a fork must not go on as its parent
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
