"""Files of `torch.export` (`.pt2`), opened without running the pickled code that they may hold.

`torch.export.load` unpickles whatever a file brings along. Here tensors are all that is unpickled. Objects of C++
classes, which the engines of Torch-TensorRT are, are native code as every engine is.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import pt2_archive

from passdeploy.errors import CorruptArtifact, first_line

_PICKLED_OBJECT, _NATIVE_OBJECT = "opaque_obj_", "custom_obj_"  # in names of files inside a `.pt2`
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def read_program(path: Path) -> Any:
    """Read the `torch.export.ExportedProgram` in a `.pt2`, without running pickled code that the file may hold.

    Raises:
        CorruptArtifact: PyTorch cannot open it, or it holds pickled objects other than tensors.
    """
    if any(_PICKLED_OBJECT in name for name in _names_in(path)):
        raise CorruptArtifact(
            f"{path.name} holds pickled objects, which run code when they are opened; it was not opened."
        )
    try:
        with _weights_only():
            return torch.export.load(path)
    except Exception as error:  # a damaged archive and unknown operators raise many types
        raise CorruptArtifact(
            f"PyTorch cannot open {path.name}: {first_line(error)}\n"
            "A program with TensorRT inside runs only where torch-tensorrt and its GPU are."
        ) from error


def holds_native_objects(path: Path) -> bool:
    """Test whether a `.pt2` holds objects of C++ classes, such as the engines of Torch-TensorRT."""
    return any(_NATIVE_OBJECT in name for name in _names_in(path))


def _names_in(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.lower() for name in archive.namelist()]  # torch's reader does not mind the case
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return []


class _NoPickles:
    """Stand-in for the module `pickle` while a file is opened."""

    @staticmethod
    def loads(*_: Any, **__: Any) -> Any:
        """Refuse."""
        raise ValueError("pickled objects run code when they are opened")


@contextmanager
def _weights_only() -> Iterator[None]:
    """Let `torch.load` take nothing but tensors inside the block: `torch.export.load` would take anything."""
    before, package = os.environ.get(_WEIGHTS_ONLY), getattr(pt2_archive, "_package", None)
    unpickler = getattr(package, "pickle", None)
    os.environ[_WEIGHTS_ONLY] = "1"
    if unpickler is not None:
        package.pickle = _NoPickles  # type: ignore[union-attr]
    try:
        yield
    finally:
        if unpickler is not None:
            package.pickle = unpickler  # type: ignore[union-attr]
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


def has_tensorrt(path: Path) -> bool:
    """Test whether a `.pt2` calls operators of Torch-TensorRT, by its text: the program is not opened."""
    try:
        with zipfile.ZipFile(path) as archive:
            texts = (name for name in archive.namelist() if name.endswith(".json"))
            return any(b"torch.ops.tensorrt." in archive.read(name) for name in texts)
    except (zipfile.BadZipFile, OSError):
        return False
