"""The run folder: artifacts, finished stages, checkpoints and logs of one run on disk.

    runs/<name>-0001/            runs/latest -> the newest run that has a slim network
      manifest.json              what was written: sha256, size_bytes, kind and versions of every artifact
      state.json                 finished stages, with their results
      metrics.jsonl  run.log     appended to while the run goes on, recorded at its end
      checkpoints/               of unfinished stages, to resume from
      ...                        the artifacts

The manifest does not list itself and `state.json`: both are replaced atomically and carry the SHA-256 of their own
content, and the same `run`, so that the state of another run is found out. The two files that are appended to are
recorded when the run is finished.
Only one process at a time writes: it holds a lock, which the system releases when the process ends. Reading needs no
lock.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock

from passdeploy.errors import CorruptArtifact, RunError
from passdeploy.runs.artifacts import OWN_VERSION, ArtifactFolder
from passdeploy.runs.checkpoint import RunCheckpoint
from passdeploy.runs.logs import LOG, METRICS, AppendedFile, log_line, metrics_line
from passdeploy.runs.numbering import MANIFEST, create_next_folder, no_run_at, release_lock, replace_link, take_lock
from passdeploy.runtime.events import Event, Listener
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.sealed_json import sealed

STATE = "state.json"
_DRAFT = re.compile(r"\..+\.\d+(\.[^.]*)?")  # files that atomic_path leaves behind when its process is killed


class RunFolder(ArtifactFolder):
    """One run on disk. A folder opened for writing holds the run's lock until `close`, or the end of a `with` block."""

    def __init__(self, path: Path, *, lock: FileLock | None, out_existed: bool | None = None) -> None:
        super().__init__(path, lock)
        self._out_existed = out_existed
        self._appended: dict[str, AppendedFile] = {}

    # --- opening and closing

    @classmethod
    def create(cls, out: Path, name: str) -> RunFolder:
        """Create `out/<name>-0001`, or the next free number, and take its lock.

        Raises:
            RunError: `out` cannot be written to.
        """
        out_existed, run = out.is_dir(), None
        try:
            out.mkdir(parents=True, exist_ok=True)
            path = create_next_folder(out, name)
            run = cls(path, lock=take_lock(path), out_existed=out_existed)
            run._write_manifest({})
        except OSError as error:
            if run:
                run.discard()
            raise RunError(
                f"cannot make a run folder in {out}: {error.strerror or error}.\nChoose another place with --out DIR."
            ) from error
        return run

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> RunFolder:
        """Open an existing run; with `write`, take its lock and remove temporary files that a killed process left.

        Raises:
            RunError: there is no run at `path`, or another process is writing to it.
        """
        folder = path.resolve()
        if not (folder / MANIFEST).is_file():
            raise RunError(no_run_at(path))
        run = cls(folder, lock=take_lock(folder) if write else None)
        if write:
            for draft in folder.rglob(".*"):
                if _DRAFT.fullmatch(draft.name) and draft.is_file():
                    draft.unlink()
        return run

    def close(self) -> None:
        """Close the log files and release the lock."""
        for file in self._appended.values():
            file.close()
        self._appended.clear()
        if self._lock:
            release_lock(self._lock, self.path)
            self._lock = None

    def discard(self) -> None:
        """Delete a run that `create` made, for runs that fail before they have any result."""
        assert self._out_existed is not None, "only a run that this process created can be discarded"
        self.close()
        shutil.rmtree(self.path)
        if not self._out_existed:
            with suppress(OSError):  # not empty: another process has a run there by now
                self.path.parent.rmdir()

    def become_latest(self) -> None:
        """Point `latest`, beside this run, at it: it is the newest that has a slim network."""
        with self._write_errors(self.path.parent / "latest"):
            replace_link(self.path.parent / "latest", self.path.name)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def content(self) -> dict[str, bytes]:
        """Read all files that a copy of the run needs, as bytes by name: manifest, state and verified artifacts."""
        own = [name for name in (MANIFEST, STATE) if (self.path / name).is_file()]
        return {name: (self.path / name).read_bytes() for name in own} | {
            name: self.verified(name).read_bytes() for name in self.manifest()
        }

    # --- stages and checkpoints

    def is_done(self, stage: str) -> bool:
        """Test whether a stage has finished, in this process or in an earlier one."""
        return stage in self._stages()

    def result_of(self, stage: str) -> dict[str, Any]:
        """Return the result that a finished stage passed to `mark_done`.

        Raises:
            KeyError: the stage has not finished.
        """
        result: dict[str, Any] = self._stages()[stage]
        return result

    def mark_done(self, stage: str, result: Mapping[str, Any] | None = None) -> None:
        """Record that a stage has finished, with its result (JSON), and delete its checkpoints."""
        with self._write_errors(self.path / STATE):
            stages = {**self._stages(), stage: dict(result or {})}
            write_atomically(self.path / STATE, sealed({"version": OWN_VERSION, **self._identity(), "stages": stages}))
        RunCheckpoint(self, stage).clear()

    def done_stages(self) -> tuple[str, ...]:
        """List the finished stages, in the order in which they finished."""
        return tuple(self._stages())

    def checkpoint(self, stage: str) -> RunCheckpoint:
        """Return the checkpoint of a stage, as `training.saving.Checkpoint` describes it."""
        return RunCheckpoint(self, stage)

    # --- listeners

    def metrics_listener(self) -> Listener:
        """Return a listener that appends every step to `metrics.jsonl`, one JSON object per line.

        A resumed stage repeats the steps after its last checkpoint; of two lines for one step, the later one is valid.
        """
        return self._appending(METRICS, metrics_line)

    def log_listener(self) -> Listener:
        """Return a listener that appends the start and end of every stage, and every warning, to `run.log`."""
        return self._appending(LOG, log_line)

    def record_logs(self) -> None:
        """Record `metrics.jsonl` and `run.log` in the manifest; the next line that is appended removes the record."""
        for name in (METRICS, LOG):
            if file := self._appended.pop(name, None):
                file.close()
            if (self.path / name).is_file():
                self.record_existing(name, "log")

    # --- internals

    def _appending(self, name: str, line_of: Callable[[Event], str | None]) -> Listener:
        def listen(event: Event) -> None:
            line = line_of(event)
            if line is None:
                return
            with self._write_errors(self.path / name):
                if name not in self._appended:
                    self._remove_record(name)
                    self._appended[name] = AppendedFile(self.path / name)
                self._appended[name].append(line)

        return listen

    def _stages(self) -> dict[str, dict[str, Any]]:
        if not (self.path / STATE).is_file():
            return {}
        document, stages = self._read_own(STATE, "stages")
        if document.get("run") != self._identity().get("run"):
            raise CorruptArtifact(
                f"{self.path / STATE} is that of another run.\nPut the original back, or start a new run."
            )
        return stages
