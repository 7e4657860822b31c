"""Parts of which a report's pages are made: tables whose cells may be charts, templates and the style sheet."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from passdeploy.display.listing import Listing

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Grid:
    """A table of the page: headings, and rows whose cells are text or charts."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str | Markup, ...], ...]
    caption: str
    notes: tuple[str, ...] = ()
    left: frozenset[int] = frozenset({0})

    @classmethod
    def of(cls, listing: Listing, caption: str) -> Grid:
        """Take over a table of the terminal."""
        return cls(listing.headings, listing.rows, caption, listing.notes, listing.left)


@cache
def templates() -> Environment:
    """Open the templates of this folder; what they show is escaped, and a name that is missing is an error."""
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def style_sheet() -> Markup:
    """Read the style sheet, which stands inside the page."""
    text = (_TEMPLATES / "style.css").read_text(encoding="utf-8")
    return Markup(re.sub(r"\n\s*", "\n", text))
