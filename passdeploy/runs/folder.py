"""The run folder: artifacts, finished stages, checkpoints and logs of one run on disk.

    runs/<name>-0001/            runs/latest -> the newest run that has a slim network
      manifest.json              what was written: sha256, size_bytes, kind and versions of every artifact
      state.json                 finished stages, with their results
      metrics.jsonl  run.log     appended to while the run goes on
      checkpoints/               of unfinished stages, to resume from
      ...                        the artifacts

An artifact is written under a temporary name, synced, renamed and recorded in the manifest, in that order, and its
bytes are compared with that record on every load. While an artifact is replaced it has no record: a process that dies
in between leaves a file without a record, which the next process writes again, and not one that seems damaged.
The manifest does not list itself, `state.json` (both are replaced atomically) and the two files that are appended to.
Tensors are stored as safetensors; nothing is pickled. Only one process at a time writes: it holds a lock, which the
system releases when the process ends. Reading needs no lock.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from filelock import FileLock

from passdeploy.errors import CorruptArtifact, DiskFullError, RunError
from passdeploy.runs.numbering import MANIFEST, create_next_folder, no_run_at, replace_link, take_lock
from passdeploy.runtime.events import Event, Listener, StageFinished, StageStarted, Step, Warned
from passdeploy.runtime.files import atomic_path, safetensors_bytes, sha256_of, write_atomically
from passdeploy.runtime.versions import package_versions

if TYPE_CHECKING:
    from torch import Tensor

STATE, METRICS, LOG = "state.json", "metrics.jsonl", "run.log"
_DRAFT = re.compile(r"\..+\.\d+(\.[^.]*)?")  # files that atomic_path leaves behind when its process is killed
_DISK_ERRNOS = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS}


class RunFolder:
    """One run on disk. A folder opened for writing holds the run's lock until `close`, or the end of a `with` block."""

    def __init__(self, path: Path, *, lock: FileLock | None, out_existed: bool | None = None) -> None:
        self.path = path
        self._lock, self._out_existed = lock, out_existed
        self._streams: dict[str, IO[str]] = {}

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
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        if self._lock:
            self._lock.release()
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

    def __truediv__(self, name: str) -> Path:
        return self.path / _require_inside(name)

    # --- artifacts

    @contextmanager
    def adding(self, name: str, kind: str, *, versions: Mapping[str, str] | None = None) -> Iterator[Path]:
        """Give a temporary path to write an artifact to; record the artifact if the block succeeds, else delete it.

        Args:
            name: its path inside the run, such as "export/model.onnx".
            kind: its kind in the manifest: "weights", "plan", "onnx", ...
            versions: versions of further packages that made it, such as {"onnx": "1.21.0"}.
        """
        target = self / name
        with self._write_errors(target):
            with atomic_path(target) as draft:
                yield draft
                entry = _manifest_entry(draft, kind, versions)
                self._remove_record(name)
            self._write_manifest({**self.manifest(), name: entry})

    def record_existing(self, name: str, kind: str, *, versions: Mapping[str, str] | None = None) -> None:
        """Record a complete file that other code has written into the run under its final name."""
        with self._write_errors(self / name):
            self._write_manifest({**self.manifest(), name: _manifest_entry(self / name, kind, versions)})

    def write_text(self, name: str, text: str, *, kind: str = "text") -> Path:
        """Write and record a text file (UTF-8)."""
        with self.adding(name, kind) as draft:
            draft.write_bytes(text.encode())
        return self / name

    def write_json(self, name: str, value: Any, *, kind: str = "json") -> Path:
        """Write and record JSON; infinite or NaN numbers raise a ValueError, since JSON has none."""
        return self.write_text(name, _to_json(value), kind=kind)

    def write_tensors(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
        *,
        kind: str = "weights",
    ) -> Path:
        """Write and record tensors as safetensors, with text in the header; equal content gives equal bytes."""
        with self.adding(name, kind) as draft:
            draft.write_bytes(safetensors_bytes(tensors, metadata or {}))
        return self / name

    def read_text(self, name: str) -> str:
        """Read an artifact as text, verified."""
        return self.verified(name).read_bytes().decode()

    def read_json(self, name: str) -> Any:
        """Read an artifact as JSON, verified."""
        return json.loads(self.read_text(name))

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """Read the tensors of an artifact to the CPU, verified."""
        from safetensors.torch import load_file

        loaded: dict[str, Tensor] = load_file(self.verified(name))
        return loaded

    def read_metadata(self, name: str) -> dict[str, str]:
        """Read the text in the header of a file of tensors, verified."""
        from safetensors import safe_open

        with safe_open(self.verified(name), framework="pt") as stream:
            return dict(stream.metadata() or {})

    def verified(self, name: str) -> Path:
        """Compare an artifact with its recorded size and SHA-256, and return its path.

        Raises:
            RunError: the run has no such artifact.
            CorruptArtifact: the file is missing or was changed.
        """
        path, entry = self / name, self.manifest().get(name)
        if entry is None:
            state = "is not recorded as finished" if path.is_file() else "is not there"
            raise RunError(
                f"run {self.path} has no {name}: it {state}.\n"
                "The step that writes it has not run, or was interrupted; run it (again)."
            )
        if not path.is_file():
            raise CorruptArtifact(
                f"{path} is recorded in {MANIFEST}, but the file is gone.\nPut it back, or make it again."
            )
        size_bytes = path.stat().st_size
        if size_bytes != entry["size_bytes"] or sha256_of(path) != entry["sha256"]:
            raise CorruptArtifact(
                f"{path} is not the file that was written: its SHA-256 is not the one in {MANIFEST} "
                f"({size_bytes:,} bytes here, {entry['size_bytes']:,} then).\n"
                "It was damaged or edited. Put the original back, or run the step that writes it again."
            )
        return path

    def has(self, name: str) -> bool:
        """Test whether an artifact of that name is recorded; its file is not read."""
        return name in self.manifest()

    def remove(self, name: str) -> None:
        """Remove an artifact and its record."""
        with self._write_errors(self / name):
            self._remove_record(name)
        (self / name).unlink(missing_ok=True)

    def manifest(self) -> dict[str, dict[str, Any]]:
        """Read the record of every artifact by name: sha256, size_bytes, kind, versions."""
        artifacts: dict[str, dict[str, Any]] = self._read_own(MANIFEST)["artifacts"]
        return artifacts

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
            write_atomically(self.path / STATE, _to_json({"version": 1, "stages": stages}))
        RunCheckpoint(self, stage).clear()

    def done_stages(self) -> tuple[str, ...]:
        """List the finished stages, in the order in which they finished."""
        return tuple(self._stages())

    def checkpoint(self, stage: str) -> RunCheckpoint:
        """Return the checkpoint of a stage, as `training.state.Checkpoint` describes it."""
        return RunCheckpoint(self, stage)

    # --- listeners

    def metrics_listener(self) -> Listener:
        """Return a listener that appends every step to `metrics.jsonl`, one JSON object per line.

        A resumed stage repeats the steps after its last checkpoint; of two lines for one step, the later one is valid.
        Infinite and NaN numbers become null.
        """

        def listen(event: Event) -> None:
            if isinstance(event, Step):
                line = {"stage": event.stage, "step": event.done, "total": event.total}
                metrics = {key: x if math.isfinite(x) else None for key, x in event.metrics.items()}
                self._append(METRICS, json.dumps({**line, **metrics}))

        return listen

    def log_listener(self) -> Listener:
        """Return a listener that appends the start and end of every stage, and every warning, to `run.log`."""

        def listen(event: Event) -> None:
            if not isinstance(event, Step):
                now = datetime.now().astimezone().isoformat(timespec="seconds")
                self._append(LOG, f"{now} {_log_line(event)}")

        return listen

    # --- internals

    def _append(self, name: str, line: str) -> None:
        with self._write_errors(self.path / name):
            if name not in self._streams:
                _drop_unfinished_line(self.path / name)
                self._streams[name] = (self.path / name).open("a", encoding="utf-8")
            self._streams[name].write(line + "\n")
            self._streams[name].flush()

    def _stages(self) -> dict[str, dict[str, Any]]:
        if not (self.path / STATE).is_file():
            return {}
        stages: dict[str, dict[str, Any]] = self._read_own(STATE)["stages"]
        return stages

    def _remove_record(self, name: str) -> None:
        artifacts = self.manifest()
        if artifacts.pop(name, None):
            self._write_manifest(artifacts)

    def _write_manifest(self, artifacts: Mapping[str, Any]) -> None:
        content = {"version": 1, "artifacts": dict(sorted(artifacts.items()))}
        write_atomically(self.path / MANIFEST, _to_json(content))

    def _read_own(self, name: str) -> Any:
        path = self.path / name
        try:
            return json.loads(path.read_bytes())
        except (ValueError, OSError) as error:
            raise CorruptArtifact(
                f"{path} cannot be read: {error}.\n"
                "Without it the run cannot be trusted. Put it back, or start a new run."
            ) from error

    @contextmanager
    def _write_errors(self, target: Path) -> Iterator[None]:
        if self._lock is None:
            raise RunError(f"cannot write {target}: this run was opened for reading, or is closed.")
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK_ERRNOS:
                raise
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(
                    f"cannot write {target}: {error.strerror}.\n"
                    "Make room, then type the same command again; passdeploy prune goes on with --resume."
                ) from error
            raise RunError(f"cannot write {target}: {error.strerror}.\nCheck the rights of the folder.") from error


class RunCheckpoint:
    """The newest saved state of one unfinished stage: one file of tensors, with JSON facts in its header.

    A new state is written under a new name, and the old file is deleted after the new one is recorded, so that there
    is always one complete state.
    """

    def __init__(self, run: RunFolder, stage: str) -> None:
        self._run, self._prefix = run, f"checkpoints/{_slug(stage)}-"

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the newest tensors and facts, verified; None if nothing was saved."""
        names = self._names()
        if not names:
            return None
        return self._run.read_tensors(names[-1]), json.loads(self._run.read_metadata(names[-1])["facts"])

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Save tensors and facts in place of earlier ones."""
        old = self._names()
        number = int(old[-1].removeprefix(self._prefix).split(".")[0]) + 1 if old else 1
        name = f"{self._prefix}{number:06d}.safetensors"
        header = {"facts": json.dumps(facts, allow_nan=False)}
        self._run.write_tensors(name, tensors, header, kind="checkpoint")
        for other in old:
            self._run.remove(other)

    def clear(self) -> None:
        """Delete all saved states of the stage."""
        for name in self._names():
            self._run.remove(name)

    def _names(self) -> list[str]:
        ours = re.compile(re.escape(self._prefix) + r"\d{6}\.safetensors")
        return sorted(name for name in self._run.manifest() if ours.fullmatch(name))


def _manifest_entry(path: Path, kind: str, versions: Mapping[str, str] | None) -> dict[str, Any]:
    """Make the record of a file for the manifest."""
    return {
        "sha256": sha256_of(path),
        "size_bytes": path.stat().st_size,
        "kind": kind,
        "versions": {**package_versions(), **(versions or {})},
    }


def _require_inside(name: str) -> str:
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{name!r} is not the name of a file inside a run")
    return name


def _drop_unfinished_line(path: Path) -> None:
    """Cut off an unfinished last line, which a killed process left."""
    if path.is_file():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def _log_line(event: Event) -> str:
    if isinstance(event, StageStarted):
        return f"{event.stage}: started, {event.text}"
    if isinstance(event, StageFinished):
        how = "taken over from before" if event.is_skipped else f"finished in {event.seconds:.1f} s"
        return f"{event.stage}: {how}" + (f", {event.text}" if event.text else "")
    assert isinstance(event, Warned)
    return f"warning: {event.text}"


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
