"""Writes that fail: the disk is full (ENOSPC) or broken (EIO) at every write of a short run, one after the other.

Every opening, writing, renaming and making of a file or folder counts as a write. The command must end with a short
error and exit code 3 or 2, what was recorded before must load, and `--resume` must end with the bits of a run without a
failure. The interpreter's own functions are replaced, so that the code of passdeploy runs as it is.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from benchmarks.reliability.tally import Tally, answer_to
from benchmarks.reliability.tiny import can_go_on, hashes_of, prune_arguments, shortened, write_recipe
from passdeploy.errors import PassDeployError
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.numbering import list_runs

GOAL = 10_000  # every write, with both errors
ERRORS = (errno.ENOSPC, errno.EIO)
_WRITING = ("mkdir", "replace", "rename", "fsync", "symlink", "truncate", "open")  # functions of `os`


class _Disk:
    """The disk, which fails at one write; writes elsewhere than below `folder` are not counted."""

    def __init__(self, folder: Path, fails_at: int | None, error: int) -> None:
        self.folder, self.fails_at, self.error, self.writes = str(folder), fails_at, error, 0

    def write(self, path: object) -> None:
        """Count a write, and let it fail if it is its turn."""
        if isinstance(path, (str, os.PathLike)) and not os.path.abspath(path).startswith(self.folder):
            return
        self.writes += 1
        if self.writes == self.fails_at:
            raise OSError(self.error, os.strerror(self.error), str(path))


class _Stream:
    """A file whose writes are counted."""

    def __init__(self, stream: Any, disk: _Disk, path: object) -> None:
        self._stream, self._disk, self._path = stream, disk, path

    def write(self, content: Any) -> Any:
        self._disk.write(self._path)
        return self._stream.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def measure(count: int = GOAL, seed: int = 0) -> Tally:
    """Let up to `count` writes fail, spread evenly over the run."""
    tally = Tally()
    with TemporaryDirectory() as temporary, shortened():
        folder = Path(temporary)
        recipe = write_recipe(folder)
        with failing_disk(folder / "whole") as disk:
            answer_to(*prune_arguments(recipe, folder / "whole"))
        expected = hashes_of(folder / "whole" / "latest")
        trials = [(number, error) for number in range(1, disk.writes + 1) for error in ERRORS]
        step = max(1, len(trials) // count)
        for number, error in trials[seed % step :: step][:count]:
            out = folder / f"failed-{number}-{error}"
            problem = _try(recipe, out, number, error, expected)
            tally.add(errno.errorcode[error], problem, trial=f"write {number} of {disk.writes}")
        tally.facts = {"writes_of_a_run": disk.writes}
    return tally


def _try(recipe: Path, out: Path, number: int, error: int, expected: dict[str, str]) -> str | None:
    with failing_disk(out, number, error) as disk:
        outcome, problem = answer_to(*prune_arguments(recipe, out))
    if problem:
        return problem
    if disk.writes < number:
        return "the run made fewer writes than the one before"
    is_done = outcome == "exit 0"  # a file that only serves an error message
    if not is_done and outcome not in ("exit 2", "exit 3"):
        return outcome
    for run in list_runs(out):
        folder = RunFolder.open(run)
        try:
            for name in folder.manifest():
                folder.verified(name)
            folder.done_stages()
        except PassDeployError as problem_of_run:
            return f"what was there before does not load: {problem_of_run}"
    can_resume = can_go_on(out)
    if not is_done:
        outcome, problem = answer_to(*prune_arguments(recipe, out, *(["--resume"] if can_resume else [])))
        if problem or outcome != "exit 0":
            return f"afterwards: {outcome}, {problem}"
    return None if hashes_of(out / "latest") == expected else "other bits after --resume"


@contextmanager
def failing_disk(folder: Path, fails_at: int | None = None, error: int = errno.ENOSPC) -> Iterator[_Disk]:
    """Count the writes below a folder inside the block; let one fail."""
    disk = _Disk(folder.absolute(), fails_at, error)
    folder.mkdir(parents=True, exist_ok=True)
    real_open = io.open

    def opened(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+") or isinstance(path, int):
            return real_open(path, mode, *arguments, **options)
        if not os.path.abspath(path).startswith(disk.folder):
            return real_open(path, mode, *arguments, **options)
        disk.write(path)
        return _Stream(real_open(path, mode, *arguments, **options), disk, path)

    def counted(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(first: Any, *arguments: Any, **options: Any) -> Any:
            flags = arguments[0] if name == "open" and arguments else 0
            if name != "open" or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                # a link is made at its second path, and a file handle lies below the folder if its file does
                path = arguments[0] if name == "symlink" else first
                disk.write(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path)
            return real(first, *arguments, **options)

        return call

    replaced = {name: counted(getattr(os, name), name) for name in _WRITING}
    with patch.object(io, "open", opened), patch.object(builtins, "open", opened), patch.multiple(os, **replaced):
        yield disk
