"""The command line, called inside a test."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from click.testing import CliRunner

from passdeploy.cli import main

# click 8.1 mixes both streams unless told not to; from 8.2 on it keeps them apart, and there is nothing to tell.
_APART = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}


@dataclass(frozen=True)
class Called:
    """What a command printed, and its exit code."""

    exit_code: int
    stdout: str
    stderr: str
    exception: BaseException | None  # that ended it, unless it is an error that the command line explains

    @property
    def output(self) -> str:
        """Both streams, one after the other."""
        return self.stdout + self.stderr


def call_command(*arguments: object) -> Called:
    """Call `passdeploy` with these arguments."""
    result = CliRunner(**_APART).invoke(main, [str(argument) for argument in arguments])
    return Called(result.exit_code, result.stdout, result.stderr, result.exception)
