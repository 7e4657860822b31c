"""A table of results as a plain value, and as text for terminals, as Markdown and as CSV.

A name is never folded and a column never narrower than its widest cell: what needs more room than a cell has goes under
the table, as a numbered note. Only notes are wrapped.
"""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

_GAP = "  "
_WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


@dataclass(frozen=True)
class Listing:
    """A table: headings, rows of text, and the notes under it."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    notes: tuple[str, ...] = ()
    left: frozenset[int] = field(default=frozenset({0}))  # columns of words; the others hold numbers, to the right

    def text(self, width: int = 80) -> str:
        """Lay the table out for a terminal of `width` characters; only the notes are wrapped."""
        table = [self.headings, *self.rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.headings))]
        lines = [self.title] if self.title else []
        lines += [self._line(self.headings, widths), _GAP.join("─" * width for width in widths)]
        lines += [self._line(row, widths) for row in self.rows]
        for note in self.notes:
            indent = "   " if note[:1].isdigit() else ""
            lines += textwrap.wrap(note, width, subsequent_indent=indent, **_WHOLE_WORDS)
        return "\n".join(line.rstrip() for line in lines)

    def markdown(self) -> str:
        """Write the table as GitHub's Markdown, its title and notes as paragraphs."""
        marks = [":---" if column in self.left else "---:" for column in range(len(self.headings))]
        lines = [f"**{_escaped(self.title)}**", ""] if self.title else []
        lines += ["| " + " | ".join(map(_escaped, row)) + " |" for row in (self.headings, tuple(marks), *self.rows)]
        for note in self.notes:
            lines += ["", _escaped(note)]
        return "\n".join(lines)

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        cells = [
            cell.ljust(width) if column in self.left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return _GAP.join(cells)


@dataclass(frozen=True)
class Facts:
    """Names with what is known of each, in two columns; what does not fit in a line goes on beneath itself."""

    rows: tuple[tuple[str, str], ...]

    def text(self, width: int = 80) -> str:
        """Lay the names and facts out in two columns for a terminal of `width` characters."""
        indent = max(len(name) for name, _ in self.rows) + 2
        blank = " " * indent
        return "\n".join(
            textwrap.fill(fact, width, initial_indent=f"{name:<{indent}}", subsequent_indent=blank, **_WHOLE_WORDS)
            for name, fact in self.rows
        )


def wrapped(text: str, width: int) -> str:
    """Break the lines of a text that are longer than `width`, between words; the rest of a line is indented.

    Lines that are indented, such as commands to copy, stay whole.
    """
    return "\n".join(
        line if line.startswith("  ") else textwrap.fill(line, width, subsequent_indent="  ", **_WHOLE_WORDS)
        for line in text.split("\n")
    )


class Footnotes:
    """Numbered notes under a table; rows with the same note share its number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number_of(self, text: str) -> str:
        """Return the number of a note, for a cell; empty where there is none."""
        return str(self._numbers.setdefault(text, len(self._numbers) + 1)) if text else ""

    def numbers_of(self, texts: Iterable[str]) -> str:
        """Return the numbers of several notes, for one cell."""
        return ",".join(self.number_of(text) for text in dict.fromkeys(texts) if text)

    def lines(self) -> tuple[str, ...]:
        """Return the notes in order, each with its number."""
        return tuple(f"{number}: {text}" for text, number in self._numbers.items())


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows of plain values as CSV with a heading; lists become text with `; ` between their items."""
    headings = list(dict.fromkeys(key for row in rows for key in row))
    stream = StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(headings)
    for row in rows:
        writer.writerow([_csv_cell(row.get(key)) for key in headings])
    return stream.getvalue().rstrip("\n")


def _csv_cell(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return "; ".join(map(str, value))
    return "" if value is None else value


def _escaped(cell: str) -> str:
    """Escape what Markdown would read as a column, a tag or emphasis."""
    for char in ("\\", "|", "<", ">", "*", "_", "`", "[", "]"):
        cell = cell.replace(char, f"\\{char}")
    return cell.replace("\n", " ") if not set(cell) <= set(":-") else cell
