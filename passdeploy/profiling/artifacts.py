"""Latency of files as they are: `.onnx`, `.engine` or `.pt2`, one by itself or two against each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passdeploy.errors import CorruptArtifact, MissingError, RunError, UsageError
from passdeploy.events import Listener, silent
from passdeploy.export.ort_session import first_line, open_session
from passdeploy.profiling.compare import Profile, Subject, profile_pair

KINDS = {".onnx": "ort", ".pt2": "torch"}


def profile_files(
    paths: Sequence[Path],
    *,
    batches: Sequence[int],
    threads: int | None = None,
    seconds: float = 4.0,
    image_size: int | None = None,
    tell: Listener = silent,
) -> Profile:
    """Measure a file, or two in turns; the second one's speed-up is over the first.

    Args:
        paths: one or two files of one kind.
        batches: images per call.
        threads: CPU threads; None takes every physical core.
        seconds: at least this long per batch size.
        image_size: of the input in pixels, where the file leaves it open.
        tell: hears what happens.

    Raises:
        UsageError: more than two files, two kinds, or a batch or shape that a file does not take.
        RunError: there is no such file.
        MissingError: what runs the file is missing: a package, a provider, a GPU.
        CorruptArtifact: a file is not what its name says.
    """
    if not 1 <= len(paths) <= 2:
        raise UsageError(f"{len(paths)} files: give one, or two to compare.")
    for path in paths:
        if not path.is_file():
            raise RunError(f"there is no file {path}.\nWrite one with: passdeploy export --onnx")
    kinds = {path.suffix for path in paths}
    if ".engine" in kinds:
        raise MissingError(
            "an engine runs on the GPU that it was built for; running engines is not in this version.\n"
            "Measure it with trtexec --loadEngine, or profile the ONNX file that it was built from."
        )
    if unknown := sorted(kinds - set(KINDS)):
        raise UsageError(f"{unknown[0] or 'no ending'} is no kind of file that can be measured: {', '.join(KINDS)}.")
    if len(kinds) > 1:
        raise UsageError(
            f"{paths[0].name} and {paths[1].name} run in two different backends: a speed-up between them would\n"
            "say nothing about the networks. Compare files of one kind."
        )
    backend = KINDS[paths[0].suffix]
    shapes = [_image_shape(path, image_size, batches) for path in paths]
    if len(set(shapes)) > 1:
        raise UsageError(
            f"{paths[0].name} takes images of {_shown(shapes[0])}, {paths[1].name} of {_shown(shapes[1])}.\n"
            "Two files are compared on the same images: export one of them again."
        )
    subjects = [_subject(path) for path in paths]
    return profile_pair(
        subjects[0], subjects[1] if len(subjects) > 1 else None, image_shape=shapes[0], backends=(backend,),
        batches=batches, threads=threads, seconds=seconds, tell=tell,
    )  # fmt: skip


def _subject(path: Path) -> Subject:
    if path.suffix == ".onnx":
        return Subject(str(path), onnx=path)
    return Subject(str(path), module=_Program(_open_program(path).module()), weights=path.name)


class _Program(nn.Module):
    """An exported program, which is in its mode for good: it knows no `eval`."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = [inner]  # in a list: no submodule, so that no mode is set

    def forward(self, images: torch.Tensor) -> Any:
        """As the program does."""
        return self.inner[0](images)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Program:
        return self


def _open_program(path: Path) -> Any:
    try:
        return torch.export.load(path)
    except Exception as error:  # whatever a damaged archive, or one with foreign operators, raises
        raise CorruptArtifact(
            f"PyTorch cannot open {path.name}: {first_line(error)}\n"
            "A program with TensorRT inside runs only where torch-tensorrt and its GPU are."
        ) from error


def _image_shape(path: Path, image_size: int | None, batches: Sequence[int]) -> tuple[int, ...]:
    """(channels, height, width) of a file's input; its batch must be one that was asked for."""
    if path.suffix == ".onnx":
        session = open_session(path, threads=1)
        shape = list(session.get_inputs()[0].shape)
        known = session.get_modelmeta().custom_metadata_map.get("batch")
        smallest, _, largest = json.loads(known) if known else (1, 1, 2**31)
        if isinstance(shape[0], int):
            smallest = largest = shape[0]
    else:
        program = _open_program(path)
        name = program.graph_signature.user_inputs[0]
        value = next(node for node in program.graph.nodes if node.name == name).meta["val"]
        shape = list(value.shape)
        smallest, largest = 1, 2**31
        if isinstance(shape[0], int):
            smallest = largest = shape[0]
    if wrong := [batch for batch in batches if not smallest <= batch <= largest]:
        made = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
        raise UsageError(
            f"{path.name} was made for batches of {made}; asked was {wrong[0]}.\n"
            f"Ask for --batch {smallest}, or export it again with another --batch."
        )
    sizes = [int(size) if isinstance(size, int) else image_size for size in shape[1:]]
    if None in sizes or (image_size is not None and any(size != image_size for size in sizes[1:])):
        raise UsageError(f"{path.name} takes images of {_shown(shape[1:])}; asked was --image-size {image_size}.")
    return tuple(int(size) for size in sizes if size is not None)


def _shown(sizes: Sequence[Any]) -> str:
    return " x ".join(map(str, sizes))
