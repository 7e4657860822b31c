"""TensorRT runner: run an engine by one enqueue per call, or by one CUDA graph, and time its layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from passdeploy.errors import CorruptArtifact
from passdeploy.export.trt_api import TensorRT
from passdeploy.export.trt_binding import BoundEngine, EngineInput, require_gpu_of_torch
from passdeploy.export.trt_sidecar import load_engine, read_sidecar
from passdeploy.profiling.cuda import capture_graph

if TYPE_CHECKING:
    import tensorrt


def read_input(path: Path, *, trust_engine: bool = False) -> EngineInput:
    """Load the engine in `path` and read its input; see `load_engine` for the errors."""
    trt, engine = load_engine(path, trust_engine=trust_engine)
    return EngineInput.from_engine(trt, engine, path.name)


class EngineRunner:
    """A runner of a TensorRT engine, which is loaded at construction.

    Args:
        name: of the network.
        path: the engine, beside its sidecar.
        cuda_graph: capture a call once, and replay it in every `run`.
        trust_engine: see `load_engine`.
        device: `cuda` or `cuda:N`, which holds its tensors.

    Raises:
        RunError, CorruptArtifact, MissingError, UsageError, ExportError: see `load_engine`.
    """

    backend = "tensorrt"

    def __init__(
        self, name: str, path: Path, *, cuda_graph: bool = False, trust_engine: bool = False, device: str = "cuda"
    ) -> None:
        self.name, self.artifact, self.device, self.path = name, path.name, device, path
        self.trt, self.engine = load_engine(path, trust_engine=trust_engine)
        self.precision = _precision(path)
        self._cuda_graph, self._call = cuda_graph, cast("Callable[[], None] | None", None)
        self._host_images = torch.empty(0)
        self.bound: BoundEngine | None = None

    def prepare(self, images: Tensor, *others: Tensor) -> None:
        """Bind the batch and the outputs, run once, and capture a CUDA graph if asked; there are no other inputs.

        Raises:
            UsageError: the engine takes images of another shape or other batches, or cannot be captured.
            ExportError: a call of TensorRT fails.
        """
        require_gpu_of_torch(self.artifact)
        self.bound = bound = BoundEngine(self.trt, self.engine, images, file=self.artifact, device=self.device)
        self._host_images = images.to(bound.images.dtype).contiguous().pin_memory()
        bound.enqueue()  # TensorRT finishes its set-up for a shape in its first call, which must not be captured
        torch.cuda.synchronize()
        self._call = capture_graph(bound.enqueue, self.artifact) if self._cuda_graph else bound.enqueue

    def run(self) -> None:
        """Queue one inference on the current stream; the clock waits for it."""
        assert self._call is not None
        self._call()

    def copy(self) -> None:
        """Copy the batch from the host to the device again."""
        assert self.bound is not None
        self.bound.images.copy_(self._host_images, non_blocking=True)


def time_engine_layers(runner: EngineRunner, *, calls: int = 20) -> dict[str, float]:
    """Time every layer of a prepared engine with TensorRT's profiler.

    TensorRT waits after every layer while it profiles, so the layers add up to more than a call takes.

    Returns:
        Name of a layer -> the median of its milliseconds over the calls, in the order of execution.
    """
    assert runner.bound is not None
    context, times = runner.bound.context, dict[str, list[float]]()
    context.profiler = _make_profiler(runner.trt, lambda name, ms: times.setdefault(name, []).append(ms))
    context.enqueue_emits_profile = False
    for _ in range(calls):
        runner.bound.enqueue()
        context.report_to_profiler()
    context.profiler = None
    return {name: float(torch.tensor(layer_ms).median()) for name, layer_ms in times.items()}


def _make_profiler(trt: TensorRT, record: Callable[[str, float], object]) -> tensorrt.IProfiler:
    """Make an IProfiler that calls `record(layer, ms)`; its base class exists only once TensorRT is imported."""
    base: Any = trt.IProfiler

    def start(self: Any) -> None:
        base.__init__(self)  # pybind11 needs the explicit call

    def report(self: Any, layer_name: str, ms: float) -> None:
        record(layer_name, ms)

    methods = {"__init__": start, "report_layer_time": report}
    return cast("tensorrt.IProfiler", type("RecordingProfiler", (base,), methods)())


def _precision(path: Path) -> str:
    """Read the precision of an engine from its sidecar."""
    try:
        return str(read_sidecar(path).get("precision", "as in the file"))
    except CorruptArtifact:  # `trust_engine` loads an engine without a sidecar
        return "as in the file"
