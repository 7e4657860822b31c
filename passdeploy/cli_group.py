"""The group of commands: errors that we raise on purpose are printed in a few lines, and exit with their code."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from passdeploy.errors import MissingError, PassDeployError, clipped
from passdeploy.runtime.files import DISK_ERRNOS
from passdeploy.runtime.interrupts import ending_on_sigterm

INTERRUPTED = 130  # exit code after Ctrl-C, as shells use it, and after SIGTERM
NOBODY_READS = 141  # exit code where the program that reads the output has ended, as shells use it for SIGPIPE
_MOST_LINES, _LONGEST_LINE = 3, 4000  # of an error; names of files may be long


class CommandGroup(click.Group):
    """A click group that prints a `PassDeployError` as a few lines on stderr; other exceptions keep their traceback."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **options: Any) -> Any:
        """Run a command and exit the process: 0, the `exit_code` of the error, or 130 after Ctrl-C."""
        arguments = list(sys.argv[1:] if args is None else args)
        # cuBLAS reads this when CUDA starts; see runtime/determinism.py, whose import would take seconds here
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        try:
            with ending_on_sigterm():
                code = super().main(arguments, **{**options, "standalone_mode": False, "obj": {"arguments": arguments}})
        except PassDeployError as error:
            if "--debug" in arguments:
                traceback.print_exc()
            _print_error(str(error), type(error).__name__, error.exit_code, arguments, error.facts)
            code = error.exit_code
        except click.ClickException as error:
            if "--json" in arguments:
                _print_error(error.format_message(), "UsageError", error.exit_code, arguments)
            else:
                with _if_anybody_reads():
                    error.show()
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            with _if_anybody_reads():
                click.echo("interrupted", err=True)
                _print_json_error("interrupted", "Interrupted", INTERRUPTED, arguments)
            code = INTERRUPTED
        except OSError as error:
            if error.errno not in DISK_ERRNOS and not _lacks_temporary_folder(error):
                raise
            if "--debug" in arguments:
                traceback.print_exc()
            _print_error(_disk_message(error), "DiskError", MissingError.exit_code, arguments)
            code = MissingError.exit_code
        except _NobodyReads:
            _print_no_more()
            code = NOBODY_READS
        sys.exit(code if isinstance(code, int) else 0)

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Parse the arguments, which prints the help where it is asked for."""
        try:
            return super().make_context(*arguments, **options)
        except BrokenPipeError as error:
            raise _NobodyReads from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _NobodyReads from error


class _NobodyReads(Exception):
    """The end of the program that reads what a command prints."""


def _print_error(
    message: str, kind: str, exit_code: int, arguments: Sequence[str], facts: Mapping[str, str] | None = None
) -> None:
    """Print an error on stderr and, with `--json` among the arguments, as a JSON object on stdout."""
    with _if_anybody_reads():
        click.echo(f"error: {_printable(message)}", err=True)
        _print_json_error(message, kind, exit_code, arguments, facts)


def _print_json_error(
    message: str, kind: str, exit_code: int, arguments: Sequence[str], facts: Mapping[str, str] | None = None
) -> None:
    if "--json" in arguments:
        click.echo(json.dumps({"error": {"kind": kind, "message": message, "exit_code": exit_code, **(facts or {})}}))


@contextmanager
def _if_anybody_reads() -> Iterator[None]:
    """Let the block print; where the program that reads it has ended, print nothing from here on."""
    try:
        yield
    except BrokenPipeError:
        _print_no_more()


def _print_no_more() -> None:
    """Drop what is left in the streams, which would be written, and fail, when Python ends."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nothing, stream.fileno())


def _printable(message: str) -> str:
    """Return a message in three lines at most without control characters, which names of files may bring along."""
    lines = message.split("\n")
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES - 1 :] = [" ".join(lines[_MOST_LINES - 1 :])]
    return "\n".join(clipped(line, limit=_LONGEST_LINE) for line in lines)


def _disk_message(error: OSError) -> str:
    """Explain a disk that is full, read-only or broken, where no part of passdeploy has explained it better."""
    if _lacks_temporary_folder(error):
        return (
            "there is no folder for temporary files: none of those that the system uses can be written to.\n"
            f"{clipped(error.strerror, 300)}\nMake room there, or name another one: TMPDIR."
        )
    where = f" {error.filename}" if error.filename else ""
    return (
        f"a file{where} cannot be read or written: {error.strerror}.\n"
        "Make room, or name other places: TMPDIR for temporary files, PASSDEPLOY_CACHE for measurements, --out."
    )


def _lacks_temporary_folder(error: OSError) -> bool:
    """Test for the error of `tempfile`, which has the number of a missing file."""
    return error.errno == errno.ENOENT and "temporary directory" in str(error.strerror)
