"""Files of a run with a record of each, its artifacts; every load compares the bytes with the record.

An artifact is written under a temporary name, synced, renamed and recorded in the manifest, in that order. While it is
replaced it has no record: a process that dies in between leaves a file without a record, which the next process writes
again, and not one that seems damaged. Tensors are stored as safetensors; nothing is pickled.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from passdeploy.errors import CorruptArtifact, DiskFullError, RunError
from passdeploy.runs.numbering import MANIFEST
from passdeploy.runtime.files import atomic_path, safetensors_bytes, sha256_of, write_atomically
from passdeploy.runtime.versions import package_versions

if TYPE_CHECKING:
    from torch import Tensor

_DISK_ERRNOS = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS}


class ArtifactFolder:
    """A folder of artifacts and their manifest; only the holder of its lock writes."""

    def __init__(self, path: Path, lock: FileLock | None) -> None:
        self.path, self._lock = path, lock

    def __truediv__(self, name: str) -> Path:
        return self.path / _require_inside(name)

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
        return self.write_text(name, json_text(value), kind=kind)

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

    def _remove_record(self, name: str) -> None:
        artifacts = self.manifest()
        if artifacts.pop(name, None):
            self._write_manifest(artifacts)

    def _write_manifest(self, artifacts: Mapping[str, Any]) -> None:
        content = {"version": 1, "artifacts": dict(sorted(artifacts.items()))}
        write_atomically(self.path / MANIFEST, json_text(content))

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


def json_text(value: Any) -> str:
    """Convert to indented JSON; infinite or NaN numbers raise a ValueError."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
