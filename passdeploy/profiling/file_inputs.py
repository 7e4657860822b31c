"""Inputs of exported files: their names, types and shapes, the sizes that are open, and values to time them with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passdeploy.errors import CorruptArtifact, UsageError
from passdeploy.export.artifact import BatchRange
from passdeploy.export.ort_session import open_session
from passdeploy.profiling.inputs import shape_text
from passdeploy.profiling.program_file import read_program
from passdeploy.profiling.trt_runner import read_input

UNBOUNDED = 2**31  # largest batch of a file that takes any

_ORT_TYPES = {
    "float": torch.float32,
    "float16": torch.float16,
    "double": torch.float64,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}

Size = int | str | None  # a number, the name of an open size, or an open size without a name


@dataclass(frozen=True)
class InputTensor:
    """One input of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[Size, ...]

    @property
    def has_batch(self) -> bool:
        """True if the first size is that of the batch: it is open, or the tensor has the four sizes of images."""
        return bool(self.shape) and (not isinstance(self.shape[0], int) or len(self.shape) == 4)

    @property
    def pixels(self) -> tuple[int, ...]:
        """The places of an image's height and width in the shape; empty where it is no image."""
        channels = [place for place in (1, 3) if len(self.shape) == 4 and self.shape[place] in (1, 3, 4)]
        return {1: (2, 3), 3: (1, 2)}[channels[0]] if channels else ()

    @property
    def text(self) -> str:
        """The input in words: its name, type and shape."""
        sizes = shape_text(["any" if size is None else size for size in self.shape]) or "a number"
        return f"{self.name} ({str(self.dtype).removeprefix('torch.')}, {sizes})"


@dataclass(frozen=True)
class FileInputs:
    """All inputs of a file, and the batches that it takes."""

    file: str
    tensors: tuple[InputTensor, ...]
    smallest: int = 1
    largest: int = UNBOUNDED

    @property
    def has_batch(self) -> bool:
        """True if an input has a batch."""
        return any(tensor.has_batch for tensor in self.tensors)

    def with_sizes(self, image_size: int | None, shapes: Mapping[str, Sequence[int]]) -> FileInputs:
        """Return these inputs with a number for every size but that of the batch.

        Args:
            image_size: height and width of images, where the file leaves them open.
            shapes: whole shapes by the name of the input, as they were asked for.

        Raises:
            UsageError: a size is open, or another one was asked for; the message says what to give.
        """
        if unknown := sorted(set(shapes) - {tensor.name for tensor in self.tensors}):
            raise UsageError(f"{self.file} has no input {unknown[0]!r}.\nIt takes {self.text}.")
        tensors = tuple(self._sized(tensor, image_size, shapes.get(tensor.name)) for tensor in self.tensors)
        return FileInputs(self.file, tensors, self.smallest, self.largest)

    def sample_shape(self) -> tuple[int, ...]:
        """Return the shape of the first input, whose sizes are numbers, without the batch."""
        first = self.tensors[0]
        return tuple(int(size) for size in first.shape[first.has_batch :] if isinstance(size, int))

    def possible_batches(self, asked: Sequence[int] | None) -> list[int]:
        """Return the batches to measure: those asked for, or of 1 and 8 those that the file takes.

        Raises:
            UsageError: the file does not take one that was asked for.
        """
        if not self.has_batch:
            if asked is not None and any(batch != 1 for batch in asked):
                raise UsageError(f"{self.file} takes {self.text}, without a batch: leave out --batch.")
            return [1]
        if asked is None:
            return [batch for batch in (1, 8) if self.smallest <= batch <= self.largest] or [self.smallest]
        if wrong := [batch for batch in asked if not self.smallest <= batch <= self.largest]:
            range_text = f"{self.smallest} to {self.largest}"
            made = f"{self.smallest}" if self.smallest == self.largest else range_text
            raise UsageError(
                f"{self.file} was made for batches of {made}; asked was {wrong[0]}.\n"
                f"Ask for --batch {self.smallest}, or export it again with another --batch."
            )
        return list(asked)

    def values(self, batch: int) -> tuple[Tensor, ...]:
        """Make values for every input, the same every time: noise, pixels, or small whole numbers."""
        return tuple(_values_of(tensor, batch) for tensor in self.tensors)

    def shapes(self, batch: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the numpy type and the shape of every input by its name."""
        return {
            tensor.name: (str(tensor.dtype).removeprefix("torch."), _shape_of(tensor, batch)) for tensor in self.tensors
        }

    @property
    def text(self) -> str:
        """The inputs in words."""
        return ", ".join(tensor.text for tensor in self.tensors)

    def _sized(self, tensor: InputTensor, image_size: int | None, shape: Sequence[int] | None) -> InputTensor:
        sizes, first = list(tensor.shape), int(tensor.has_batch)
        if shape is not None:
            is_other = [isinstance(size, int) and size != asked for size, asked in zip(sizes, shape, strict=False)]
            if len(shape) != len(sizes) or any(is_other):
                raise UsageError(f"{self.file} takes {tensor.text}; asked was --shape {tensor.name}={_joined(shape)}.")
            sizes[first:] = shape[first:]
        elif image_size and any(_is_number(sizes[i]) and sizes[i] != image_size for i in tensor.pixels):
            raise UsageError(
                f"{self.file} takes images of {shape_text(sizes[1:])}; asked was --image-size {image_size}."
            )
        for place in tensor.pixels:
            sizes[place] = sizes[place] if _is_number(sizes[place]) else image_size
        if not all(_is_number(size) for size in sizes[first:]):
            raise UsageError(self._advice(tensor))
        return replace(tensor, shape=tuple(sizes))

    def _advice(self, tensor: InputTensor) -> str:
        shown = shape_text(["any" if size is None else size for size in tensor.shape[tensor.has_batch :]])
        is_open = [place for place, size in enumerate(tensor.shape) if place and not _is_number(size)]
        if set(is_open) <= set(tensor.pixels):
            return f"{self.file} takes images of {shown}, of any size.\nSay which: --image-size 224, for example."
        example = [int(size) if _is_number(size) else 128 if place else 1 for place, size in enumerate(tensor.shape)]  # type: ignore[arg-type]
        return (
            f"{self.file} takes {tensor.text}, with sizes that are open.\n"
            f"Say which: --shape {tensor.name}={_joined(example)}, for example."
        )


def read_file_inputs(path: Path, *, trust_engine: bool = False) -> FileInputs:
    """Read the inputs of an `.onnx`, `.engine` or `.pt2`.

    Raises:
        UsageError: the file takes no input, or one that is no tensor of numbers.
        MissingError, CorruptArtifact, RunError: the file cannot be opened here.
    """
    smallest, largest = 1, UNBOUNDED
    if path.suffix.lower() == ".onnx":
        session = open_session(path, threads=1)
        try:
            tensors = tuple(_ort_input(path, each) for each in session.get_inputs())
            known = session.get_modelmeta().custom_metadata_map.get("batch")
        except UnicodeDecodeError as error:
            raise CorruptArtifact(f"{path} has names that are no text; it is damaged.") from error
        smallest, largest = _batches_in(known)
    elif path.suffix.lower() == ".engine":
        engine = read_input(path, trust_engine=trust_engine)
        tensors = (InputTensor("images", torch.float32, (None, *engine.image)),)
        smallest, largest = engine.smallest, engine.largest
    else:
        tensors = _program_inputs(path)
    if not tensors:
        raise UsageError(
            f"{path.name} takes no input, so that it always answers the same: there is nothing to measure."
        )
    fixed = {tensor.shape[0] for tensor in tensors if tensor.has_batch and isinstance(tensor.shape[0], int)}
    if len(fixed) == 1:
        smallest = largest = int(fixed.pop() or 1)
    return FileInputs(path.name, tensors, smallest, largest)


def _ort_input(path: Path, node: Any) -> InputTensor:
    kind = str(node.type)
    dtype = _ORT_TYPES.get(kind.removeprefix("tensor(").removesuffix(")")) if kind.startswith("tensor(") else None
    if dtype is None:
        raise UsageError(
            f"{path.name} takes {node.name}, a {kind}, for which no values can be made here.\n"
            f"Inputs are tensors of {', '.join(_ORT_TYPES)}."
        )
    return InputTensor(node.name, dtype, tuple(_size(size) for size in node.shape))


def _size(size: Any) -> Size:
    """Return a size as a number, or its name; zero and less stand for an open size in some exporters' files."""
    return (size if size > 0 else None) if isinstance(size, int) else size or None


def _batches_in(metadata: str | None) -> tuple[int, int]:
    """Read the smallest and the largest batch that an exported file was made for; any, where it says nothing of use."""
    try:
        smallest, _, largest = map(index, BatchRange.of(json.loads(metadata or "")).as_list())
    except (ValueError, TypeError, RecursionError, UsageError):
        return 1, UNBOUNDED
    return smallest, largest


def _program_inputs(path: Path) -> tuple[InputTensor, ...]:
    program = read_program(path)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    found = []
    for name in program.graph_signature.user_inputs:
        value = values.get(name)
        if not isinstance(value, Tensor):
            raise UsageError(f"{path.name} takes {name}, which is no tensor: no values can be made for it here.")
        sizes: list[Size] = [size if isinstance(size, int) else str(size) for size in value.shape]
        found.append(InputTensor(str(name), value.dtype, tuple(sizes)))
    return tuple(found)


def _values_of(tensor: InputTensor, batch: int) -> Tensor:
    shape = _shape_of(tensor, batch)
    generator = torch.Generator().manual_seed(0)
    if tensor.dtype.is_floating_point:
        is_map = len(shape) > 2  # an image; a small tensor is a threshold, or a list of features
        make = torch.randn if is_map else torch.rand
        return make(shape, generator=generator).to(tensor.dtype)
    if tensor.dtype is torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    most = 256 if tensor.dtype is torch.uint8 else 128 if tensor.dtype is torch.int8 else 2  # pixels, or tokens
    return torch.randint(0, most, shape, generator=generator).to(tensor.dtype)


def _shape_of(tensor: InputTensor, batch: int) -> tuple[int, ...]:
    return tuple(
        batch if place == 0 and tensor.has_batch else int(size or 1) for place, size in enumerate(tensor.shape)
    )


def _is_number(size: Size) -> bool:
    return isinstance(size, int)


def _joined(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
