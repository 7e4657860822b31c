"""Run folders side by side: numbered names, the `latest` link, and the lock of the one process that may write."""

from __future__ import annotations

import difflib
import json
import os
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from shlex import quote
from socket import gethostname
from time import sleep

from filelock import FileLock, Timeout

from passdeploy.errors import RunError, clipped

MANIFEST, LOCK = "manifest.json", ".lock"
LATEST = Path("runs/latest")  # the run that commands take where none is named
WRITER = ".writer.json"  # who holds the lock
_LOOKS, _BETWEEN_LOOKS_S = 10, 0.05  # at WRITER, which is written a moment after the lock was taken
_NUMBERED = re.compile(r"(?P<name>.+)-(?P<number>\d{4,})")


def list_runs(out: Path) -> tuple[Path, ...]:
    """List the run folders in `out`, sorted by name and number."""
    if not out.is_dir():
        return ()
    found = (path for path in out.iterdir() if (path / MANIFEST).is_file() and not path.is_symlink())
    return tuple(sorted(found, key=lambda path: _sort_key(path.name)))


def _sort_key(folder_name: str) -> tuple[str, int]:
    """Sort by name and number: `tiny-10000` comes after `tiny-9999`."""
    numbered = _NUMBERED.fullmatch(folder_name)
    return (numbered["name"], int(numbered["number"])) if numbered else (folder_name, 0)


def create_next_folder(out: Path, name: str) -> Path:
    """Create the folder `<name>-NNNN` with the next free number; two processes never get the same one."""
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


def name_without_number(folder_name: str) -> str:
    """Return the name in `<name>-NNNN`; that of a folder without a number as it is.

    >>> name_without_number("tiny-0001"), name_without_number("tiny-0001-copy"), name_without_number("final")
    ('tiny', 'tiny-0001-copy', 'final')
    """
    numbered = _NUMBERED.fullmatch(folder_name)
    return numbered["name"] if numbered else folder_name


def run_option(run: Path) -> str:
    """Return ` --run PATH` as it is typed in the working folder; empty where commands take that run by themselves."""
    if run == LATEST or run.resolve() == LATEST.resolve():
        return ""
    return f" --run {quote(str(as_typed(run)))}"


def as_typed(path: Path) -> Path:
    """Return a path as it is typed in the working folder: relative if it lies there."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def replace_link(link: Path, target: str) -> None:
    """Point the symbolic link `link` at `target` (relative), atomically. A real folder of that name is left alone."""
    if link.exists() and not link.is_symlink():
        return
    draft = link.with_name(f".{link.name}.{target}")  # unique, since no two runs have one name
    draft.unlink(missing_ok=True)
    draft.symlink_to(target, target_is_directory=True)
    draft.replace(link)


def link_target(link: Path) -> str | None:
    """Return the target of a symbolic link; None for anything else."""
    return os.readlink(link) if link.is_symlink() else None


def take_lock(path: Path) -> FileLock:
    """Take the lock of a run folder, without waiting.

    Raises:
        RunError: another process holds it, which the message names, or the folder cannot be written to.
    """
    lock = FileLock(path / LOCK, timeout=0)
    try:
        for look in range(_LOOKS):
            try:
                lock.acquire()
                break
            except Timeout:
                # one that only looks at the run is gone at the next try; one that writes says so a moment later
                if (writer := _writer_of(path)) or look == _LOOKS - 1:
                    raise
                sleep(_BETWEEN_LOOKS_S)
        with suppress(OSError):  # it only serves the error of the next process
            (path / WRITER).write_text(json.dumps({"pid": os.getpid(), "host": gethostname(), "since": _now()}))
    except Timeout as error:
        raise RunError(
            f"another process is writing to the run {path}{writer}.\nWait until it is done, or start a run of your own."
        ) from error
    except OSError as error:
        raise RunError(
            f"cannot write to the run {path}: {error.strerror or error}.\nCheck the rights of the folder."
        ) from error
    return lock


def release_lock(lock: FileLock, path: Path) -> None:
    """Release the lock of a run folder."""
    with suppress(OSError):  # the folder may be gone
        (path / WRITER).unlink()
    lock.release()


def is_being_written(path: Path) -> bool:
    """Test whether another process writes to a run; one of another host is taken at its word."""
    if not _writer_of(path):
        return False
    try:
        with FileLock(path / LOCK, timeout=0):
            return False  # the note of a process that was killed, whose number another one has now
    except (Timeout, OSError):
        return True


def _writer_of(path: Path) -> str:
    """Name the process that holds the lock of a run folder: `: PID 4711 on gpu-3, since 10:02`; empty if unknown."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        writer = json.loads((path / WRITER).read_text())
        pid, host, since = int(writer["pid"]), str(writer["host"]), str(writer["since"])
        if host != gethostname() or _is_alive(pid):
            return clipped(f": PID {pid} on {host}, since {since}", 200)
    return ""


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # where a signal of number 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def no_run_at(path: Path) -> str:
    """Write an error message about a missing run, which names the runs beside it."""
    runs = [run.name for run in list_runs(path.parent)]
    if path.is_symlink() and not path.exists():
        problem = f"{path} points at {os.readlink(path)!r}, which is not there"
    elif path.is_symlink():
        problem = f"{path} points at {os.readlink(path)!r}, which holds no {MANIFEST}"
    else:
        problem = f"{path} holds no {MANIFEST}" if path.exists() else f"there is no run at {path}"
        if (path / "summary.json").is_file() or (path / "recipe.resolved.yaml").is_file():
            return (
                f"{path} was a run, but its {MANIFEST} is gone, and without it no file of it is trusted.\n"
                "Put it back, or make the run again."
            )
    if runs and path.name == "latest":
        return (
            f"{problem}: no run in {path.parent} is finished.\n"
            f"Name one with --run, or go on with its recipe and --resume: {', '.join(runs[-3:])}."
        )
    if not path.exists() and (LATEST.parent / path.name / MANIFEST).is_file():
        return f"{problem}.\nDo you mean {LATEST.parent / path.name}?"
    if runs:
        nearest = difflib.get_close_matches(path.name, runs, n=3, cutoff=0.3) or runs[-3:]
        return f"{problem}.\nRuns in {path.parent}: {', '.join(nearest)}."
    return f"{problem}.\nMake one with `passdeploy prune --recipe mobilenetv2.yaml`."
