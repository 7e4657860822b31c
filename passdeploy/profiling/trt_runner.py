"""TensorRT runner: bind an engine's tensors to memory and run it by one enqueue per call, or by one CUDA graph.

The range of batches is read from the engine's optimisation profile, shapes and types from its tensors. PyTorch provides
the memory and the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from passdeploy.errors import CorruptArtifact, ExportError, UsageError
from passdeploy.export.trt_api import TensorRT
from passdeploy.export.trt_sidecar import load_engine, read_sidecar
from passdeploy.profiling.cuda import capture_graph, require_gpu_of_torch
from passdeploy.profiling.inputs import shape_text

if TYPE_CHECKING:
    import tensorrt

_TORCH_DTYPE_OF_TRT = {  # TensorRT's name of a type -> PyTorch's type
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class EngineInput:
    """The input of an engine: its name, the image shape and the range of batch sizes."""

    name: str
    image: tuple[int, ...]  # channels, height, width
    smallest: int  # batch of the optimisation profile; equal to `largest` for a fixed batch
    largest: int

    @classmethod
    def from_engine(cls, trt: TensorRT, engine: tensorrt.ICudaEngine, file: str) -> EngineInput:
        """Read the only input of `engine`; `file` names it in errors.

        Raises:
            UsageError: the engine has several inputs, or none.
        """
        names = _tensor_names(trt, engine, trt.TensorIOMode.INPUT)
        if len(names) != 1:
            raise UsageError(f"{file} has {len(names)} inputs; passdeploy measures networks that take images alone.")
        shape = tuple(engine.get_tensor_shape(names[0]))
        smallest = largest = shape[0]
        if smallest < 0:
            low, _, high = (tuple(shape) for shape in engine.get_tensor_profile_shape(names[0], 0))
            smallest, largest = low[0], high[0]
        return cls(names[0], shape[1:], smallest, largest)

    def require_fits(self, shape: tuple[int, ...], file: str) -> None:
        """Raise UsageError unless a batch of this shape fits."""
        if shape[1:] != self.image:
            raise UsageError(
                f"{file} takes images of {shape_text(self.image)}, asked was {shape_text(shape[1:])}.\n"
                "Build it again from an ONNX file of that size: passdeploy export --trt"
            )
        if not self.smallest <= shape[0] <= self.largest:
            made = f"{self.smallest}" if self.smallest == self.largest else f"{self.smallest} to {self.largest}"
            raise UsageError(
                f"{file} was built for batches of {made}; asked was {shape[0]}, outside its optimisation profile.\n"
                f"Ask for --batch {self.smallest}, or build it again with another --batch."
            )


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
        self._host_images = self._images = torch.empty(0)
        self.outputs: dict[str, Tensor] = {}
        self.context: tensorrt.IExecutionContext | None = None

    def prepare(self, images: Tensor) -> None:
        """Bind the batch and the outputs, run once, and capture a CUDA graph if asked.

        Raises:
            UsageError: the engine takes images of another shape or other batches, or cannot be captured.
            ExportError: a call of TensorRT fails.
        """
        engine_input = EngineInput.from_engine(self.trt, self.engine, self.artifact)
        engine_input.require_fits(tuple(images.shape), self.artifact)
        require_gpu_of_torch(self.artifact)
        context = self.engine.create_execution_context()
        if context is None:
            raise ExportError(f"TensorRT cannot start {self.artifact}: it has not enough memory, or gave no reason.")
        self.context = context
        self._host_images = images.to(self._torch_dtype(engine_input.name)).contiguous().pin_memory()
        self._images = self._host_images.to(self.device)
        self._require_success(context.set_input_shape(engine_input.name, tuple(images.shape)), "the shape of its input")
        self._bind(engine_input.name, self._images)
        for name in _tensor_names(self.trt, self.engine, self.trt.TensorIOMode.OUTPUT):
            shape = tuple(context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise UsageError(f"output {name!r} of {self.artifact} has a shape that depends on the images.")
            self.outputs[name] = torch.empty(shape, dtype=self._torch_dtype(name), device=self.device)
            self._bind(name, self.outputs[name])
        if missing := context.infer_shapes():
            raise ExportError(f"{self.artifact} still waits for {', '.join(missing)}.")
        self.enqueue()  # TensorRT finishes its set-up for a shape in its first call, which must not be captured
        torch.cuda.synchronize()
        self._call = capture_graph(self.enqueue, self.artifact) if self._cuda_graph else self.enqueue

    def run(self) -> None:
        """Queue one inference on the current stream; the clock waits for it."""
        assert self._call is not None
        self._call()

    def copy(self) -> None:
        """Copy the batch from the host to the device again."""
        self._images.copy_(self._host_images, non_blocking=True)

    def enqueue(self) -> None:
        """Queue one inference without a CUDA graph."""
        assert self.context is not None
        self._require_success(self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream), "the call")

    def _bind(self, name: str, tensor: Tensor) -> None:
        """Give TensorRT the address of a tensor."""
        assert self.context is not None
        self._require_success(self.context.set_tensor_address(name, tensor.data_ptr()), f"the address of {name!r}")

    def _torch_dtype(self, name: str) -> torch.dtype:
        """Return PyTorch's type for a tensor of the engine."""
        trt_type = self.engine.get_tensor_dtype(name).name
        if trt_type not in _TORCH_DTYPE_OF_TRT:
            raise UsageError(f"tensor {name!r} of {self.artifact} is {trt_type}, which PyTorch cannot hold.")
        return _TORCH_DTYPE_OF_TRT[trt_type]

    def _require_success(self, is_done: bool, what: str) -> None:
        """Raise ExportError if a call of TensorRT has returned False."""
        if not is_done:
            raise ExportError(f"TensorRT refuses {what}, running {self.artifact}.")


def time_engine_layers(runner: EngineRunner, *, calls: int = 20) -> dict[str, float]:
    """Time every layer of a prepared engine with TensorRT's profiler.

    TensorRT waits after every layer while it profiles, so the layers add up to more than a call takes.

    Returns:
        Name of a layer -> the median of its milliseconds over the calls, in the order of execution.
    """
    context, times = runner.context, dict[str, list[float]]()
    assert context is not None
    context.profiler = _make_profiler(runner.trt, lambda name, ms: times.setdefault(name, []).append(ms))
    context.enqueue_emits_profile = False
    for _ in range(calls):
        runner.enqueue()
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


def _tensor_names(trt: TensorRT, engine: tensorrt.ICudaEngine, mode: tensorrt.TensorIOMode) -> list[str]:
    """List the inputs or the outputs of an engine."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == mode]


def _precision(path: Path) -> str:
    """Read the precision of an engine from its sidecar."""
    try:
        return str(read_sidecar(path).get("precision", "as in the file"))
    except CorruptArtifact:  # `trust_engine` loads an engine without a sidecar
        return "as in the file"
