"""Candidates: the networks of a comparison, the files and modules they come as, and the runner for each backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from passdeploy.errors import UsageError
from passdeploy.export.torch_trt_program import require_loadable
from passdeploy.export.torch_trt_release import load_torch_trt
from passdeploy.export.trt_binding import require_gpu_of_torch
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.program_file import read_program
from passdeploy.profiling.runners import PROVIDERS, CompiledRunner, OrtRunner, ProgramRunner, Runner, TorchRunner
from passdeploy.profiling.trt_runner import EngineRunner

_FORM_NEEDED = {  # by backend; the other backends need an ONNX file
    "torch": "module",
    "compile": "module",
    "tensorrt": "engine",
    "torch-trt": "Torch-TensorRT program",
}


@dataclass(frozen=True)
class Candidate:
    """One of the two networks of a comparison, in every form that a backend may need."""

    name: str  # "dense" or "slim"
    module: nn.Module | None = None  # for "torch" and "compile"
    onnx: Path | None = None  # for "ort", "ort-cuda" and "ort-trt"
    engine: Path | None = None  # for "tensorrt"
    program: Path | None = None  # a .pt2, for "torch-trt" and, without TensorRT inside, for "torch"
    weights: str = ""  # the file the module came from, for the record
    inputs: Callable[[int], tuple[Tensor, ...]] | None = None  # batch -> its inputs; None: float32 images
    trust_engine: bool = False  # load an engine without a sidecar, or one that runs code of its own


def make_runner(candidate: Candidate, backend: str, threads: int, setting: Setting) -> Runner:
    """Build the runner of a candidate for a backend.

    Raises:
        UsageError: the candidate lacks the form that the backend needs.
        MissingError, CorruptArtifact, RunError, ExportError: the form cannot be opened here.
    """
    device = str(setting.device_of(backend))
    if backend == "torch" and candidate.module is not None:
        return TorchRunner(candidate.name, candidate.module, artifact=candidate.weights, setting=setting)
    if backend == "compile" and candidate.module is not None:
        return CompiledRunner(candidate.name, candidate.module, artifact=candidate.weights, setting=setting)
    if backend in PROVIDERS and candidate.onnx is not None:
        return OrtRunner(candidate.name, candidate.onnx, threads=threads, backend=backend, device=device)
    if backend == "tensorrt" and candidate.engine is not None:
        return EngineRunner(
            candidate.name,
            candidate.engine,
            cuda_graph=setting.cuda_graph,
            trust_engine=candidate.trust_engine,
            device=device,
        )
    if backend in ("torch", "torch-trt") and candidate.program is not None:
        return ProgramRunner(
            candidate.name,
            open_program(candidate.program, backend, device),
            artifact=candidate.program.name,
            backend=backend,
            device=device,
            precision=setting.precision if backend == "torch-trt" else "as in the file",
            cuda_graph=setting.cuda_graph,
        )
    form = _FORM_NEEDED.get(backend, "ONNX file")
    raise UsageError(f"the {candidate.name} network has no {form} to run in {backend}.")


def open_program(path: Path, backend: str, device: str) -> Callable[[Tensor], Any]:
    """Open a `.pt2` as a function on `device`.

    For `torch-trt`, Torch-TensorRT is imported first, because that registers its operators.

    Raises:
        MissingError: Torch-TensorRT or its GPU is not here, or the program was compiled by another.
        CorruptArtifact: the file is no program.
    """
    if backend == "torch-trt":
        require_loadable(path)
        load_torch_trt()
        require_gpu_of_torch(path.name)
    program = read_program(path)
    if device != "cpu" and backend == "torch":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    function: Callable[[Tensor], Any] = program.module()
    return function
