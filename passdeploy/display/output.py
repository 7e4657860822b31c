"""Printing of a command's result: tables and lines on stdout, the next command to type on stderr."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from passdeploy.display.listing import Facts, Listing, csv_text, wrapped

_WIDEST = 120  # characters of a line of notes, on terminals that are wider


@dataclass(frozen=True)
class Output:
    """The form in which a command prints its result: as JSON, quietly, or for people."""

    as_json: bool = False
    is_quiet: bool = False

    def show(
        self,
        document: Any,
        *parts: Listing | Facts | str,
        paths: Sequence[object] = (),
        next_step: str = "",
        or_step: str = "",
        rows: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """Print the result of a command.

        Args:
            document: printed on stdout as JSON with `--json`, and then nothing else is.
            parts: tables and lines for people, on stdout, as wide as the terminal; with `--quiet` only where no path
                was written.
            paths: files and folders that were written, one a line on stdout.
            next_step: the next command to type, on stderr; not with `--quiet`.
            or_step: another one, in a line of its own.
            rows: print these as CSV on stdout instead of `parts` and `paths`; None: no CSV.
        """
        if self.as_json:
            click.echo(json.dumps(document, indent=2))
            return
        if rows is not None:
            click.echo(csv_text(rows))
            return
        width = min(_WIDEST, max(40, shutil.get_terminal_size((80, 24)).columns))
        if not (self.is_quiet and paths):
            for part in parts:
                click.echo(_laid_out(part, width))
        for path in paths:
            click.echo(str(path))
        if next_step and not self.is_quiet:
            click.echo(f"next: {next_step}", err=True)
            if or_step:
                click.echo(f"  or: {or_step}", err=True)


def _laid_out(part: Listing | Facts | str, width: int) -> str:
    """Lay a part out for a terminal of `width` characters; an empty line follows a table."""
    if isinstance(part, Listing):
        return part.text(width) + "\n"
    return part.text(width) if isinstance(part, Facts) else wrapped(part, width)
