"""Read the tensors of a weights file, as people publish them: .safetensors, .pt, .pth, .bin, .ckpt.

What a file is, its first bytes say, not its name. Files of PyTorch are pickles, which can run code when they are
opened. They are read with `weights_only=True`, and what is no tensor, number, text or container in them becomes an
inert `_Placeholder`: nothing of the file runs.
"""

from __future__ import annotations

import pickle
import shlex
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from passdeploy.errors import WeightsError, clipped, first_line

_ZIP, _PICKLE, _LFS = b"PK\x03\x04", b"\x80", b"version https://git-lfs"
_MOST_DEPTH = 4  # of dictionaries inside of dictionaries


@dataclass(frozen=True)
class WeightFile:
    """Tensors of a file by name, in one flat dictionary for each place where the file has some."""

    path: Path
    places: dict[str, dict[str, Tensor]]  # such as `model` or `ema.state_dict`; empty: the file itself
    others: dict[str, str]  # what else is at the top of the file -> its type


class _Placeholder:
    """Instance of a class that a file names, without its code."""

    kind = ""  # the full name of the class

    def __new__(cls, *_: Any, **__: Any) -> _Placeholder:
        """Take whatever the class would take."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes."""
        attributes = state[0] if isinstance(state, tuple) and state else state
        self.attributes = attributes if isinstance(attributes, dict) else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Ignore an item: classes that are lists get theirs like this."""

    def extend(self, values: Any) -> None:
        """Ignore items."""

    @property
    def is_module(self) -> bool:
        """True for an `nn.Module`."""
        return {"_parameters", "_buffers", "_modules"} <= set(getattr(self, "attributes", {}))


def read_weight_file(path: Path) -> WeightFile:
    """Read the tensors of a weights file.

    Raises:
        WeightsError: it is damaged, holds no tensors, or holds a whole pickled module instead of tensors with names.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    if start.startswith(_LFS):
        raise WeightsError(f"{path} is a pointer of Git LFS, not the file itself.\nFetch it with: git lfs pull")
    if start.startswith((_ZIP, _PICKLE)) and start[8:9] != b"{":  # a safetensors file begins with a length, and JSON
        content = _load_pickle(path)
    else:
        try:
            content = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            if path.suffix.lower() != ".safetensors":
                raise WeightsError(
                    f"{path} is neither a file of torch.save nor a .safetensors file.\nIs it whole? Get it again."
                ) from error
            raise WeightsError(f"{path} is not a readable .safetensors file: {clipped(error, 120)}") from error
    if (where := _module_in(content)) is not None:
        raise WeightsError(_module_message(path, where))
    places = dict(_tensors_in(content))
    if not places:
        kind = content.kind if isinstance(content, _Placeholder) else type(content).__name__
        raise WeightsError(
            f"{path} holds no tensors with names, but a {kind}.\nSave them with: torch.save(model.state_dict(), NEW)"
        )
    top = content if isinstance(content, Mapping) and "" not in places else {}
    taken = {place.partition(".")[0] for place in places}
    return WeightFile(path, places, {str(key): _kind_of(value) for key, value in top.items() if str(key) not in taken})


def _load_pickle(path: Path) -> Any:
    try:
        with _placeholders_for(path), path.open("rb") as stream:  # torch would go by the name of a path
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise errors of many types
        text = str(error)
        if "TorchScript" in text:
            raise WeightsError(
                f"{path} is TorchScript, a program with weights inside.\n"
                f"Write its tensors once: {_python('torch.save(torch.jit.load(OLD).state_dict(), NEW)', path)}"
            ) from error
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in text:
            raise WeightsError(_module_message(path, "")) from error
        raise WeightsError(
            f"{path} cannot be read: {first_line(error, longest=120)}\nIs it whole? Get it again."
        ) from error


def _placeholders_for(path: Path) -> AbstractContextManager[None]:
    """Let placeholders stand for all classes and functions that a file names and torch does not allow."""
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip archive: files from before PyTorch 1.6
        return nullcontext()
    return safe_globals([(type("_Named", (_Placeholder,), {"kind": name}), name) for name in names])


def _tensors_in(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the places in a file that hold tensors with names, and these; optimizer states number theirs."""
    if not isinstance(content, Mapping) or depth > _MOST_DEPTH:
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
        return
    for key, value in content.items():
        if isinstance(key, str):
            yield from _tensors_in(value, f"{place}.{key}" if place else key, depth + 1)


def _module_in(content: Any) -> str | None:
    """Return the Python expression for a pickled module in a file, after its content: `['model']`; None without one."""
    if isinstance(content, _Placeholder):
        return "" if content.is_module else None
    if isinstance(content, Mapping) and not any(isinstance(value, Mapping | Tensor) for value in content.values()):
        for key, value in content.items():
            if isinstance(value, _Placeholder) and value.is_module:
                return f"[{key!r}]"
    return None


def _module_message(path: Path, where: str) -> str:
    code = _python(f"torch.save(torch.load(OLD, weights_only=False){where}.state_dict(), NEW)", path)
    return (
        f"{path} holds a whole pickled network{f' under {where[1:-1]}' if where else ''}, whose code would run when it "
        f"is opened; only tensors with names are read.\nIf you trust it, write its state_dict once, where its code can "
        f"be imported:\n{code}"
    )


def _python(code: str, path: Path) -> str:
    new = path.with_name(f"{path.stem}-weights.pt").name
    return "python -c " + shlex.quote("import torch; " + code.replace("OLD", repr(str(path))).replace("NEW", repr(new)))


def _kind_of(value: Any) -> str:
    return value.kind if isinstance(value, _Placeholder) else type(value).__name__
