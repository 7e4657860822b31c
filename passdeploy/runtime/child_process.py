"""Python processes that do for this one what may crash or must run beside it: how they start, answer and end."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any


def child_environment(**changes: str) -> dict[str, str]:
    """Return the environment of a Python process that imports what this one does, with some variables changed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **changes}


def how_it_ended(returncode: int) -> str:
    """Describe a return code of `subprocess`.

    >>> how_it_ended(-11), how_it_ended(1)
    ('SIGSEGV', 'exit code 1')
    """
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


class ChildEnded(Exception):
    """The end of a process that should have answered; its text is that of `how_it_ended`."""


class AnsweringChild:
    """A process that answers one request (JSON) a line, as `answer_requests` does, until it is closed or crashes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def start(cls, module: str, *arguments: str, **environment: str) -> AnsweringChild:
        """Start a module that calls `answer_requests`; what it prints is dropped."""
        return cls(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=child_environment(**environment),
            )
        )

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """True once the process runs no more."""
        return self._process.poll() is not None

    def ask(self, request: dict[str, Any], *, limit_s: float) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            ChildEnded: the process ended before it answered, or it was ended by something that is no answer.
            TimeoutError: there is no answer within the limit.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            line: bytes | None = b""
        else:
            line = self._read_line(limit_s)
        if line is None:
            raise TimeoutError
        if not line.endswith(b"\n"):
            raise ChildEnded(how_it_ended(self._process.wait()))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _read_line(self, limit_s: float) -> bytes | None:
        """Read an answer; None if there is none within the limit."""
        assert self._process.stdout is not None
        if os.name != "nt":  # where pipes cannot be waited for
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                if not selector.select(limit_s):
                    return None
        return self._process.stdout.readline()


def answer_requests(answer: Callable[[dict[str, Any]], dict[str, Any]], *, memory_bytes: int | None = None) -> None:
    """Answer requests until stdin ends, in the process that `AnsweringChild.start` started.

    Args:
        answer: makes the answer to a request.
        memory_bytes: limit of the address space; None: none, since CUDA reserves more than there is memory.
    """
    _limit(memory_bytes)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


def _limit(memory_bytes: int | None) -> None:
    """Limit the address space, and write no core dump."""
    try:
        import resource
    except ImportError:  # on Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
