"""Answers for a GPU that is not there, with which Torch-TensorRT for RTX builds real engines on a CPU.

Torch-TensorRT asks `torch.cuda` six questions while it is imported and while it builds, moves what stays in PyTorch to
the GPU, and loads each engine once it is built, which takes a driver. The answers, parts that stay where they are and
engines that stay bytes are all that is replaced: lowering, partition, converters, NVIDIA's builder and the saved
program are real. Nothing that was built is run.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

GPU = SimpleNamespace(
    name="NVIDIA GeForce RTX 4090", major=8, minor=9, total_memory=24 << 30, multi_processor_count=128
)


@cache
def import_without_gpu() -> Any:
    """Import `torch_tensorrt` with answers for `GPU`, which stay for the rest of the process.

    `torch.cuda.is_available` is true during the import only: torch.export saves the state of a GPU's generator, and
    passdeploy runs what it has compiled, where there is said to be a GPU.
    """
    answers: dict[str, Any] = {
        "get_device_capability": lambda *_: (GPU.major, GPU.minor),
        "get_device_properties": lambda *_: GPU,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "mem_get_info": lambda *_: (GPU.total_memory, GPU.total_memory),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    is_available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch_trt = importlib.import_module("torch_tensorrt")
    finally:
        torch.cuda.is_available = is_available
    _keep_engines_unloaded()
    return torch_trt


class _UnloadedEngine:
    """An engine that was built and not loaded: its bytes."""

    def __init__(self, plan: bytes) -> None:
        self._plan = plan

    def serialize(self) -> bytes:
        return self._plan

    def get_aliased_input_tensor(self, _: str) -> None:
        return None


class _Runtime:
    """TensorRT's runtime, which needs a driver: it hands built engines back as they are."""

    def __init__(self, _: object) -> None:
        pass

    def deserialize_cuda_engine(self, plan: Any) -> _UnloadedEngine:
        return _UnloadedEngine(bytes(memoryview(plan)))


def _keep_engines_unloaded() -> None:
    """Replace the loading of built engines, in the interpreter and in the module that would run one."""
    interpreter: Any = importlib.import_module("torch_tensorrt.dynamo.conversion._TRTInterpreter")
    runtime: Any = importlib.import_module("torch_tensorrt.dynamo.runtime._TorchTensorRTModule")
    serialised: Any = importlib.import_module("torch_tensorrt.dynamo.runtime._TRTEngine")
    bindings = interpreter.trt

    class Bindings:
        def __getattr__(self, name: str) -> Any:
            return _Runtime if name == "Runtime" else getattr(bindings, name)

    interpreter.trt = Bindings()
    # Parts that stay in PyTorch would be moved to the GPU.
    importlib.import_module("torch_tensorrt.dynamo._compiler").to_torch_device = lambda _: torch.device("cpu")  # type: ignore[attr-defined]
    module = runtime.TorchTensorRTModule

    def keep_bytes(self: Any) -> None:
        """Hold the engine in the form in which it is saved."""
        if self.engine is None:
            self.engine = serialised.EngineSerializer(self._pack_engine_info())

    module.setup_engine = keep_bytes
    module.set_output_tensors_as_unowned = lambda self, enabled: None
