"""Files of a run with a record of each, its artifacts; every load compares the bytes with the record.

An artifact is written under a temporary name, synced, renamed and recorded in the manifest, in that order. While it is
replaced it has no record: a process that dies in between leaves a file without a record, which the next process writes
again, and not one that seems damaged. Tensors are stored as safetensors; nothing is pickled. The manifest carries the
SHA-256 of its own content (`runtime/sealed_json.py`); those of earlier versions had none and are read without.
"""

from __future__ import annotations

import errno
import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from filelock import FileLock

from passdeploy.errors import CorruptArtifact, DiskFullError, RunError, clipped, enumerated
from passdeploy.runs.numbering import MANIFEST, as_typed
from passdeploy.runtime.files import DISK_ERRNOS, atomic_path, safetensors_bytes, sha256_of, write_atomically
from passdeploy.runtime.sealed_json import BrokenSealError, read_sealed, sealed
from passdeploy.runtime.versions import package_versions

if TYPE_CHECKING:
    from torch import Tensor

OWN_VERSION = 2  # of the manifest and of state.json; from 2 on they are sealed
_MOST_NAMES = 6  # of files in an error


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

    def unrecord(self, name: str) -> None:
        """Drop the record of a file that other code is about to replace: no record is right for both."""
        with self._write_errors(self / name):
            self._remove_record(name)

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
        path, entry = self / name, self.record_of(name)
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

    def record_of(self, name: str) -> dict[str, Any]:
        """Return the record of an artifact: sha256, size_bytes, kind, versions.

        Raises:
            RunError: the run has no such artifact.
        """
        entry = self.manifest().get(name)
        if entry is None:
            state = "is not recorded as finished" if (self / name).is_file() else "is not there"
            raise RunError(f"run {self.path} has no {name}: it {state}.\n{self._how_to_go_on()}")
        return entry

    def _how_to_go_on(self) -> str:
        """Say what writes a file that the run lacks: the rest of the run, or a step after it."""
        if not self.has("recipe.resolved.yaml") or self.has("summary.json"):
            return "The step that writes it has not run, or was interrupted; run it (again)."
        recipe, out = as_typed(self.path / "recipe.resolved.yaml"), as_typed(self.path.parent)
        command = shlex.join(["passdeploy", "prune", "--recipe", str(recipe), "--out", str(out), "--resume"])
        return f"The run is not finished: wait for it, or where it was stopped, go on with: {command}"

    def verified_if_recorded(self, name: str) -> Path:
        """Return the path of a file that is appended to, verified if the run was finished since."""
        return self.verified(name) if self.has(name) else self / name

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
        _, artifacts = self._read_own(MANIFEST, "artifacts")
        return artifacts

    def _remove_record(self, name: str) -> None:
        artifacts = self.manifest()
        if artifacts.pop(name, None):
            self._write_manifest(artifacts)

    def _write_manifest(self, artifacts: Mapping[str, Any]) -> None:
        content = {"version": OWN_VERSION, **self._identity(), "artifacts": dict(sorted(artifacts.items()))}
        write_atomically(self.path / MANIFEST, sealed(content))

    def _identity(self) -> dict[str, str]:
        """Return the key `run`, which manifest and `state.json` have in common; those of earlier versions have none."""
        if not (self.path / MANIFEST).is_file():
            return {"run": uuid4().hex}
        document, _ = self._read_own(MANIFEST, "artifacts")
        return {"run": document["run"]} if "run" in document else {}

    def _read_own(self, name: str, key: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Read the manifest or the finished stages: all of the file, and its entries, which stand under `key`."""
        path = self.path / name
        try:
            document = read_sealed(path.read_bytes(), version_key="version", sealed_from=OWN_VERSION)
            entries: dict[str, dict[str, Any]] = document[key]
            needed = ("sha256", "size_bytes") if name == MANIFEST else ()
            if not all(set(needed) <= entry.keys() for entry in entries.values()):
                raise ValueError("an entry is not complete")
            for entry_name in entries if name == MANIFEST else ():
                _require_inside(entry_name)
        except BrokenSealError as error:
            raise CorruptArtifact(f"{path} was damaged or edited.\n{self._still_trusted(error.document)}") from error
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            raise CorruptArtifact(
                f"{path} cannot be read: {clipped(error, 120)}.\n"
                "Without it no file of the run can be trusted. Put it back, or start a new run."
            ) from error
        return document, entries

    def _still_trusted(self, document: Mapping[str, Any]) -> str:
        """Say which files are as the records of a damaged manifest have them: no damage makes a SHA-256 fit."""
        artifacts, fitting = document.get("artifacts"), list[str]()
        for name, entry in artifacts.items() if isinstance(artifacts, dict) else ():
            with suppress(OSError, ValueError, TypeError, KeyError):
                if sha256_of(self / name) == entry["sha256"]:
                    fitting.append(name)
        if not fitting:
            return "Nothing in it can be trusted. Put the original back, or start a new run."
        shown = enumerated(fitting, most=_MOST_NAMES)
        return f"Still as they were written: {clipped(shown, 300)}.\nPut the original back, or start a new run."

    @contextmanager
    def _write_errors(self, target: Path) -> Iterator[None]:
        if self._lock is None:
            raise RunError(f"cannot write {target}: this run was opened for reading, or is closed.")
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_ERRNOS:
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
