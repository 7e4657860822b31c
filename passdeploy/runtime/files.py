"""Atomic writing of files, SHA-256 hashes, and reproducible safetensors bytes.

Every result is written under a temporary name in its folder, synced to disk, and renamed: an interrupted run leaves
the old file or none, never half of a new one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from passdeploy.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

# a disk that is full, read-only or broken, as opposed to a mistake in the program
DISK_ERRNOS = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS}
_CHUNK_BYTES = 1 << 20


def expanded(path: str) -> Path:
    """Replace `~` and `~user` at the beginning of a path; that of an unknown user stays, and is no file."""
    return Path(os.path.expanduser(path))


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file, as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, which is renamed to `path` if the block succeeds, else deleted.

    It has the suffix of `path`, since some writers choose their format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield draft
        _sync(draft)
        draft.replace(path)
        _sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to `path`, completely or not at all."""
    with atomic_path(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def _sync(path: Path) -> None:
    """Flush a file or a folder to disk; on Windows, folders cannot be opened and are skipped."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Make the bytes of a safetensors file; the same content gives the same bytes.

    The safetensors library writes metadata keys in an order that changes from call to call, so the metadata are put
    into the header here. A file is the header's length (8 bytes), the header (JSON), and the data.
    """
    from safetensors.torch import save

    # copies: the library refuses tensors that share memory, such as tied weights
    content: bytes = save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
    data_at = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8:data_at])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data stays aligned
    return len(text).to_bytes(8, "little") + text + content[data_at:]


def write_for_user(path: Path, content: bytes | str) -> None:
    """Write a file at a place that the user has named.

    Raises:
        UsageError: it cannot be written there.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}.\nName another place, or make room."
        ) from error


def require_writable(folder: Path) -> None:
    """Check that files can be written to a folder that the user has named; it need not exist yet.

    Raises:
        UsageError: they cannot.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UsageError(f"cannot write to {folder}: {nearest} is a file.\nName another folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(
            f"cannot write to {folder}: {nearest} is read-only.\nName another folder, or change its rights."
        )
