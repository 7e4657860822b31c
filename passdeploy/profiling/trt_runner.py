"""Run a TensorRT engine: tensors are bound by name to addresses, and a call is one enqueue, or one CUDA graph.

What an engine takes is its own answer: the range of the batch from its optimisation profile, the shape and the types
of its tensors. Memory and streams are PyTorch's.
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
from passdeploy.profiling.cuda import captured, require_gpu_of_torch

if TYPE_CHECKING:
    import tensorrt

_TYPES = {  # TensorRT's name of a type -> PyTorch's type
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
    """What an engine takes."""

    name: str
    image: tuple[int, ...]  # channels, height, width
    smallest: int  # batch of the optimisation profile, or the only one
    largest: int

    @classmethod
    def of(cls, trt: TensorRT, engine: tensorrt.ICudaEngine, file: str) -> EngineInput:
        """The only input of `engine`.

        Raises:
            UsageError: it has several, or none.
        """
        names = _tensors(trt, engine, trt.TensorIOMode.INPUT)
        if len(names) != 1:
            raise UsageError(f"{file} has {len(names)} inputs; passdeploy measures networks that take images alone.")
        shape = tuple(engine.get_tensor_shape(names[0]))
        smallest = largest = shape[0]
        if smallest < 0:
            low, _, high = (tuple(shape) for shape in engine.get_tensor_profile_shape(names[0], 0))
            smallest, largest = low[0], high[0]
        return cls(names[0], shape[1:], smallest, largest)

    def require(self, shape: tuple[int, ...], file: str) -> None:
        """Raise UsageError unless a batch of this shape fits."""
        if shape[1:] != self.image:
            raise UsageError(
                f"{file} takes images of {_shown(self.image)}, asked was {_shown(shape[1:])}.\n"
                "Build it again from an ONNX file of that size: passdeploy export --trt"
            )
        if not self.smallest <= shape[0] <= self.largest:
            made = f"{self.smallest}" if self.smallest == self.largest else f"{self.smallest} to {self.largest}"
            raise UsageError(
                f"{file} was built for batches of {made}; asked was {shape[0]}, outside its optimisation profile.\n"
                f"Ask for --batch {self.smallest}, or build it again with another --batch."
            )


def read_input(path: Path, *, trust_engine: bool = False) -> EngineInput:
    """What the engine in `path` takes; it is loaded for that. See `load_engine` for what can go wrong."""
    trt, engine = load_engine(path, trust_engine=trust_engine)
    return EngineInput.of(trt, engine, path.name)


class EngineRunner:
    """A TensorRT engine, loaded.

    Args:
        name: of the network.
        path: the engine, beside its sidecar.
        cuda_graph: capture a call, and replay it.
        trust_engine: see `load_engine`.
        device: `cuda` or `cuda:N`, where its tensors are.

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
        self._staged = self._images = torch.empty(0)
        self.outputs: dict[str, Tensor] = {}
        self.context: tensorrt.IExecutionContext | None = None

    def prepare(self, images: Tensor) -> None:
        """Bind the batch and the outputs, run once, and capture if asked.

        Raises:
            UsageError: the engine takes images of another shape or other batches, or cannot be captured.
            ExportError: TensorRT refuses.
        """
        wanted = EngineInput.of(self.trt, self.engine, self.artifact)
        wanted.require(tuple(images.shape), self.artifact)
        require_gpu_of_torch(self.artifact)
        context = self.engine.create_execution_context()
        if context is None:
            raise ExportError(f"TensorRT cannot start {self.artifact}: it has not enough memory, or gave no reason.")
        self.context = context
        self._staged = images.to(self._type_of(wanted.name)).contiguous().pin_memory()
        self._images = self._staged.to(self.device)
        self._require(context.set_input_shape(wanted.name, tuple(images.shape)), "the shape of its input")
        self._bind(wanted.name, self._images)
        for name in _tensors(self.trt, self.engine, self.trt.TensorIOMode.OUTPUT):
            shape = tuple(context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise UsageError(f"output {name!r} of {self.artifact} has a shape that depends on the images.")
            self.outputs[name] = torch.empty(shape, dtype=self._type_of(name), device=self.device)
            self._bind(name, self.outputs[name])
        if missing := context.infer_shapes():
            raise ExportError(f"{self.artifact} still waits for {', '.join(missing)}.")
        self.enqueue()  # TensorRT finishes its set-up for a shape in its first call, which must not be captured
        torch.cuda.synchronize()
        self._call = captured(self.enqueue, self.artifact) if self._cuda_graph else self.enqueue

    def run(self) -> None:
        """One inference, queued on the current stream; the clock waits for it."""
        assert self._call is not None
        self._call()

    def copy(self) -> None:
        """The batch once more from the host to the device."""
        self._images.copy_(self._staged, non_blocking=True)

    def enqueue(self) -> None:
        """One inference without a graph."""
        assert self.context is not None
        self._require(self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream), "the call")

    def _bind(self, name: str, tensor: Tensor) -> None:
        assert self.context is not None
        self._require(self.context.set_tensor_address(name, tensor.data_ptr()), f"the address of {name!r}")

    def _type_of(self, name: str) -> torch.dtype:
        found = self.engine.get_tensor_dtype(name).name
        if found not in _TYPES:
            raise UsageError(f"tensor {name!r} of {self.artifact} is {found}, which PyTorch cannot hold.")
        return _TYPES[found]

    def _require(self, is_done: bool, what: str) -> None:
        if not is_done:
            raise ExportError(f"TensorRT refuses {what}, running {self.artifact}.")


def trace_engine(runner: EngineRunner, *, calls: int = 20) -> dict[str, float]:
    """Milliseconds of every layer of a prepared engine, in order, by its own profiler: medians over calls.

    TensorRT waits after every layer while it profiles, so that the layers add up to more than a call takes.
    """
    context, times = runner.context, dict[str, list[float]]()
    assert context is not None
    context.profiler = _profiler(runner.trt, lambda name, ms: times.setdefault(name, []).append(ms))
    context.enqueue_emits_profile = False
    for _ in range(calls):
        runner.enqueue()
        context.report_to_profiler()
    context.profiler = None
    return {name: float(torch.tensor(found).median()) for name, found in times.items()}


def _profiler(trt: TensorRT, note: Callable[[str, float], object]) -> tensorrt.IProfiler:
    """An IProfiler that tells `note`. Its base class is known only once TensorRT is imported."""
    base: Any = trt.IProfiler

    def start(self: Any) -> None:
        base.__init__(self)  # pybind11 asks for the explicit call

    def report(self: Any, layer_name: str, ms: float) -> None:
        note(layer_name, ms)

    return cast("tensorrt.IProfiler", type("Noting", (base,), {"__init__": start, "report_layer_time": report})())


def _tensors(trt: TensorRT, engine: tensorrt.ICudaEngine, mode: tensorrt.TensorIOMode) -> list[str]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == mode]


def _precision(path: Path) -> str:
    try:
        return str(read_sidecar(path).get("precision", "as in the file"))
    except CorruptArtifact:  # it was trusted without one
        return "as in the file"


def _shown(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
