"""Tensors of a TensorRT engine: read what it takes, bind a batch and its outputs to memory, and queue calls.

The range of batches is read from the engine's optimisation profile, shapes and types from its tensors. PyTorch provides
the memory and the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from passdeploy.errors import ExportError, MissingError, UsageError
from passdeploy.export.trt_api import TensorRT

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
        names = tensor_names(trt, engine, trt.TensorIOMode.INPUT)
        if len(names) != 1:
            raise UsageError(f"{file} has {len(names)} inputs; passdeploy runs networks that take images alone.")
        shape = tuple(engine.get_tensor_shape(names[0]))
        smallest = largest = shape[0]
        if smallest < 0:
            low, _, high = (tuple(shape) for shape in engine.get_tensor_profile_shape(names[0], 0))
            smallest, largest = low[0], high[0]
        return cls(names[0], shape[1:], smallest, largest)

    def require_fits(self, shape: tuple[int, ...], file: str) -> None:
        """Raise UsageError unless a batch of this shape fits."""
        if shape[1:] != self.image:
            taken, asked = (" x ".join(map(str, image)) for image in (self.image, shape[1:]))
            raise UsageError(
                f"{file} takes images of {taken}, asked was {asked}.\n"
                "Build it again from an ONNX file of that size: passdeploy export --trt"
            )
        if not self.smallest <= shape[0] <= self.largest:
            made = f"{self.smallest}" if self.smallest == self.largest else f"{self.smallest} to {self.largest}"
            raise UsageError(
                f"{file} was built for batches of {made}; asked was {shape[0]}, outside its optimisation profile.\n"
                f"Ask for --batch {self.smallest}, or build it again with another --batch."
            )


class BoundEngine:
    """An engine with one batch of images and its outputs bound to memory.

    Args:
        trt: the TensorRT that loaded the engine.
        engine: takes images alone.
        images: (batch, channels, height, width), in any type; copied to `device` in the engine's type.
        file: names the engine in errors.
        device: `cuda` or `cuda:N`, which holds the tensors.

    Raises:
        UsageError: the engine takes images of another shape or other batches.
        ExportError: a call of TensorRT fails.
    """

    def __init__(
        self, trt: TensorRT, engine: tensorrt.ICudaEngine, images: Tensor, *, file: str, device: str = "cuda"
    ) -> None:
        self.file, self._engine = file, engine
        engine_input = EngineInput.from_engine(trt, engine, file)
        engine_input.require_fits(tuple(images.shape), file)
        context = engine.create_execution_context()
        if context is None:
            raise ExportError(f"TensorRT cannot start {file}: it has not enough memory, or gave no reason.")
        self.context = context
        self.images = images.to(device, self._torch_dtype(engine_input.name)).contiguous()
        self.outputs: dict[str, Tensor] = {}
        self._require_success(context.set_input_shape(engine_input.name, tuple(images.shape)), "the shape of its input")
        self._bind(engine_input.name, self.images)
        for name in tensor_names(trt, engine, trt.TensorIOMode.OUTPUT):
            shape = tuple(context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise UsageError(f"output {name!r} of {file} has a shape that depends on the images.")
            self.outputs[name] = torch.empty(shape, dtype=self._torch_dtype(name), device=device)
            self._bind(name, self.outputs[name])
        if missing := context.infer_shapes():
            raise ExportError(f"{file} still waits for {', '.join(missing)}.")

    def enqueue(self) -> None:
        """Queue one inference on the current stream; the outputs are there once the stream has come so far.

        Raises:
            ExportError: TensorRT refuses the call.
        """
        self._require_success(self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream), "the call")

    def _bind(self, name: str, tensor: Tensor) -> None:
        """Give TensorRT the address of a tensor."""
        self._require_success(self.context.set_tensor_address(name, tensor.data_ptr()), f"the address of {name!r}")

    def _torch_dtype(self, name: str) -> torch.dtype:
        """Return PyTorch's type for a tensor of the engine."""
        trt_type = self._engine.get_tensor_dtype(name).name
        if trt_type not in _TORCH_DTYPE_OF_TRT:
            raise UsageError(f"tensor {name!r} of {self.file} is {trt_type}, which PyTorch cannot hold.")
        return _TORCH_DTYPE_OF_TRT[trt_type]

    def _require_success(self, is_done: bool, what: str) -> None:
        """Raise ExportError if a call of TensorRT has returned False."""
        if not is_done:
            raise ExportError(f"TensorRT refuses {what}, running {self.file}.")


def tensor_names(trt: TensorRT, engine: tensorrt.ICudaEngine, mode: tensorrt.TensorIOMode) -> list[str]:
    """List the inputs or the outputs of an engine."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == mode]


def has_gpu_of_torch() -> bool:
    """Test whether PyTorch can use a GPU: it may be a build without CUDA on a machine that has one."""
    return bool(torch.cuda.is_available())


def require_gpu_of_torch(what: str) -> None:
    """Check that PyTorch sees a GPU, whose memory and streams `what` uses.

    Raises:
        MissingError: it sees none.
    """
    if not has_gpu_of_torch():
        raise MissingError(f"{what} runs on an NVIDIA GPU, and PyTorch sees none here.")
