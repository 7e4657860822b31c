"""Profile exported files, `.onnx`, `.engine` or `.pt2`: the latency of one, or the speed-up of one over another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from passdeploy.errors import MissingError, RunError, UsageError
from passdeploy.export.ort_session import open_session
from passdeploy.export.torch_trt_program import require_loadable
from passdeploy.export.torch_trt_release import load_torch_trt
from passdeploy.profiling.candidates import Candidate, has_tensorrt, read_program
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.inputs import shape_text
from passdeploy.profiling.pair import profile_pair
from passdeploy.profiling.report import Profile
from passdeploy.profiling.runners import PROVIDERS
from passdeploy.profiling.trt_runner import read_input
from passdeploy.runtime.devices import find_device
from passdeploy.runtime.events import Listener, Warned, silent

_BACKEND_OF_SUFFIX = {".onnx": "ort", ".engine": "tensorrt", ".pt2": "torch"}
_UNBOUNDED = 2**31  # largest batch of a file that takes any


def profile_files(
    paths: Sequence[Path],
    *,
    batches: Sequence[int],
    backend: str | None = None,
    threads: int | None = None,
    setting: Setting | None = None,
    seconds: float = 4.0,
    image_size: int | None = None,
    trust_engine: bool = False,
    listener: Listener = silent,
) -> Profile:
    """Measure one file, or two in turns with the speed-up of the second over the first.

    Args:
        paths: one or two files of one kind.
        batches: images per call.
        backend: `ort`, `ort-cuda` or `ort-trt` for an ONNX file; None takes the default for the kind of file: ONNX
            Runtime (CUDA where it starts), TensorRT, or PyTorch (Torch-TensorRT for a program with TensorRT inside).
        threads: CPU threads; None takes every physical core.
        setting: the device, which may be `auto`, and whether an engine is captured as a CUDA graph; not the precision,
            which is fixed in the files. None: the GPU, without one the CPU.
        seconds: at least this long per batch size.
        image_size: of the input in pixels, for a file that does not fix it.
        trust_engine: load engines that have no sidecar, or that run code of their own.
        listener: receives the progress events.

    Raises:
        UsageError: more than two files, two kinds, or a batch or shape that a file does not take.
        RunError: there is no such file.
        MissingError: a package, provider or GPU that is needed to run the file is missing.
        CorruptArtifact: a file is damaged, or not of the kind that its name says.
    """
    if not 1 <= len(paths) <= 2:
        raise UsageError(f"{len(paths)} files: give one, or two to compare.")
    for path in paths:
        if not path.is_file():
            raise RunError(f"there is no file {path}.\nWrite one with: passdeploy export --onnx")
    setting = setting or Setting(device="auto")
    backend = _backend_of(paths, backend, setting.device, listener)
    setting = setting.resolved((backend,), listener)
    if setting.precision != "fp32":
        raise UsageError("a file is in the precision that it was exported in: leave out --precision.")
    if setting.channels_last:
        raise UsageError("a file is in the memory format that it was exported in: leave out --channels-last.")
    setting.require_possible((backend,))
    if backend == "torch-trt":
        for path in paths:
            require_loadable(path)
        load_torch_trt()  # its operators must be known before a program that has them is opened
    shapes = [_image_shape(path, image_size, batches, trust_engine) for path in paths]
    if len(set(shapes)) > 1:
        raise UsageError(
            f"{paths[0].name} takes images of {shape_text(shapes[0])}, {paths[1].name} of {shape_text(shapes[1])}.\n"
            "Two files are compared on the same images: export one of them again."
        )
    form = {".onnx": "onnx", ".engine": "engine", ".pt2": "program"}[paths[0].suffix]
    candidates = [Candidate(str(path), **{form: path}, trust_engine=trust_engine) for path in paths]  # type: ignore[arg-type]
    return profile_pair(
        candidates[0],
        candidates[1] if len(candidates) > 1 else None,
        image_shape=shapes[0],
        backends=(backend,),
        batches=batches,
        threads=threads,
        setting=setting,
        seconds=seconds,
        listener=listener,
    )


def _backend_of(paths: Sequence[Path], asked: str | None, device: str, listener: Listener) -> str:
    """Choose the backend for these files and check it against the one asked for."""
    kinds = {path.suffix for path in paths}
    if unknown := sorted(kinds - set(_BACKEND_OF_SUFFIX)):
        raise UsageError(
            f"{unknown[0] or 'no ending'} is no kind of file that can be measured: {', '.join(_BACKEND_OF_SUFFIX)}."
        )
    defaults = {
        "torch-trt" if path.suffix == ".pt2" and has_tensorrt(path) else _BACKEND_OF_SUFFIX[path.suffix]
        for path in paths
    }
    if len(defaults) > 1:
        raise UsageError(
            f"{paths[0].name} and {paths[1].name} run in two different backends: a speed-up between them would\n"
            "say nothing about the networks. Compare files of one kind."
        )
    (backend,) = defaults
    if asked is None and backend == "ort" and find_device(device).type == "cuda":
        return "ort-cuda" if device != "auto" or _starts_with_cuda(paths[0], listener) else "ort"
    if asked is None or asked == backend:
        return backend
    if backend == "ort" and asked in ("ort-cuda", "ort-trt"):
        return asked
    raise UsageError(f"{paths[0].name} runs in {backend}, not in {asked}: leave out --backend.")


def _starts_with_cuda(path: Path, listener: Listener) -> bool:
    """Test whether ONNX Runtime opens a file with its CUDA provider; warn if it does not."""
    try:
        open_session(path, threads=1, provider=PROVIDERS["ort-cuda"])
    except MissingError as error:
        listener(Warned(f"{path.name} is measured on the CPU: {error}"))
        return False
    return True


def _image_shape(
    path: Path, image_size: int | None, batches: Sequence[int], trust_engine: bool = False
) -> tuple[int, ...]:
    """Return (channels, height, width) of a file's input, and check that the file takes the batches asked for."""
    smallest, largest = 1, _UNBOUNDED
    shape: list[Any]
    if path.suffix == ".onnx":
        session = open_session(path, threads=1)
        shape = list(session.get_inputs()[0].shape)
        known = session.get_modelmeta().custom_metadata_map.get("batch")
        smallest, _, largest = json.loads(known) if known else (1, 1, _UNBOUNDED)
    elif path.suffix == ".engine":
        engine = read_input(path, trust_engine=trust_engine)
        shape, smallest, largest = [None, *engine.image], engine.smallest, engine.largest
    else:
        program = read_program(path)
        name = program.graph_signature.user_inputs[0]
        shape = list(next(node for node in program.graph.nodes if node.name == name).meta["val"].shape)
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
        raise UsageError(f"{path.name} takes images of {shape_text(shape[1:])}; asked was --image-size {image_size}.")
    return tuple(int(size) for size in sizes if size is not None)
