"""Drafts: exported files before they were compared. They get their names once they pass, or `<name>.rejected`.

Until then they are in a folder of their own beside the finished files, so that nobody takes one for the other, and so
that a file that fails does not cost the one that passed before.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from passdeploy.errors import ParityError
from passdeploy.export.artifact import Artifact

DRAFTS = ".unproven-"  # first part of the name of a folder of drafts

Replacing = Callable[[Path], None]  # is called with the path of a file just before another one takes its place


def replacing_freely(path: Path) -> None:
    """Let any file be replaced; the default where nobody keeps a record of them."""


@contextmanager
def folder_of_drafts(folder: Path) -> Iterator[Path]:
    """Make a folder of drafts inside `folder`, and delete it with what is left in it at the end."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=DRAFTS) as drafts:
        yield Path(drafts)


def name_file(draft: Artifact, final: Path, replacing: Replacing = replacing_freely) -> Artifact:
    """Give a file that passed its name, and delete one that failed in an earlier export."""
    replacing(final)
    draft.path.replace(final)
    rejected_path(final).unlink(missing_ok=True)
    return replace(draft, path=final)


def rejected_path(path: Path) -> Path:
    """Return the path that a file gets when it fails its parity check."""
    return path.with_name(path.name + ".rejected")


def set_aside(path: Path, problem: str, final: Path | None = None) -> ParityError:
    """Rename a file to `<final>.rejected`, and return the error that states its problem."""
    final = final or path
    rejected = rejected_path(final)
    path.replace(rejected)
    return ParityError(f"{final.name} {problem}.\nThe file was set aside as {rejected}; do not deploy it.")
