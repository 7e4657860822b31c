"""Where runs lie beside each other: their numbers, the link to the latest, and who may write."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from filelock import FileLock, Timeout

from passdeploy.errors import RunError

MANIFEST, LOCK = "manifest.json", ".lock"
_NUMBERED = re.compile(r"(?P<name>.+)-(?P<number>\d{4,})")


def list_runs(out: Path) -> tuple[Path, ...]:
    """The run folders in `out`, by name."""
    if not out.is_dir():
        return ()
    return tuple(sorted(p for p in out.iterdir() if (p / MANIFEST).is_file() and not p.is_symlink()))


def create_next_folder(out: Path, name: str) -> Path:
    """Make the folder `<name>-NNNN` after the last one there is; two processes never get the same."""
    matches = (_NUMBERED.fullmatch(path.name) for path in out.iterdir())
    number = 1 + max((int(m["number"]) for m in matches if m and m["name"] == name), default=0)
    while True:
        path = out / f"{name}-{number:04d}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def replace_link(link: Path, target: str) -> None:
    """Make `link` a relative link to `target`, without a moment in which there is none."""
    if link.exists() and not link.is_symlink():
        return  # somebody's own folder of that name
    draft = link.with_name(f".{link.name}.{target}")  # runs have names of their own, also when made at once
    draft.unlink(missing_ok=True)
    draft.symlink_to(target, target_is_directory=True)
    draft.replace(link)


def link_target(link: Path) -> str | None:
    """What a link points at, if it is one."""
    return os.readlink(link) if link.is_symlink() else None


def take_lock(path: Path) -> FileLock:
    """The lock of a run, taken.

    Raises:
        RunError: another process has it, or the folder cannot be written to.
    """
    lock = FileLock(path / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunError(
            f"another process is writing to the run {path}.\nWait until it is done, or start a run of your own."
        ) from error
    except OSError as error:
        raise RunError(
            f"cannot write to the run {path}: {error.strerror or error}.\nCheck the rights of the folder."
        ) from error
    return lock


def no_run_at(path: Path) -> str:
    """In words: what is there instead, and which runs are beside it."""
    runs = [run.name for run in list_runs(path.parent)]
    if path.is_symlink():
        problem = f"{path} points at {os.readlink(path)!r}, which is not there"
    else:
        problem = f"{path} holds no {MANIFEST}" if path.exists() else f"there is no run at {path}"
    if runs:
        nearest = difflib.get_close_matches(path.name, runs, n=3, cutoff=0.3) or runs[-3:]
        return f"{problem}.\nRuns in {path.parent}: {', '.join(nearest)}."
    return f"{problem}.\nMake one with `passdeploy prune --recipe mobilenetv2.yaml`."
