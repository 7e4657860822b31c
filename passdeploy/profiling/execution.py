"""Execution setting: device, precision, memory format and CUDA graph, and which backends support which of them.

Both networks of a comparison run with the same setting, and every row of a profile records it. The target is the GPU
where there is one: `Setting.resolved` and `default_backends` are the one place that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from passdeploy.errors import UsageError
from passdeploy.runtime.devices import find_device, unused_gpu
from passdeploy.runtime.events import Listener, Warned, silent
from passdeploy.runtime.names import BACKENDS, ON_GPU

_TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_WITH_LAYOUT = {"torch", "compile"}
_WITH_GRAPH = {"torch", "compile", "tensorrt"}


def default_backends(device: torch.device, *, has_engine: bool = False, has_program: bool = False) -> tuple[str, ...]:
    """Return the backends that make sense on a device if none is named; a caller leaves out those that cannot start.

    Args:
        device: that is measured on.
        has_engine: there is a TensorRT engine to measure.
        has_program: there is a Torch-TensorRT program to measure.
    """
    if device.type != "cuda":
        return ("torch", "ort")
    exported = {"tensorrt": has_engine, "torch-trt": has_program}
    return ("torch", "compile", "ort-cuda", *(name for name, is_there in exported.items() if is_there))


@dataclass(frozen=True)
class Setting:
    """Device, precision, memory format and CUDA graph that networks are run with."""

    device: str = "cpu"  # of PyTorch, eager and compiled; the names of the other backends say theirs. See `resolved`
    precision: str = "fp32"  # PyTorch converts the network; files are taken in this precision
    channels_last: bool = False  # memory format of PyTorch's images and weights
    cuda_graph: bool = False  # one launch for the whole network

    @property
    def options(self) -> tuple[str, ...]:
        """The options that differ from the defaults, named as on the command line."""
        named = {"channels-last": self.channels_last, "cuda-graph": self.cuda_graph}
        return tuple(name for name, is_on in named.items() if is_on)

    def resolved(self, backends: Sequence[str] = (), listener: Listener = silent) -> Setting:
        """Return this setting with a device in place of `auto`: the GPU where there is one, else the CPU.

        With `ort` among `backends`, those that were asked for by name, it is the CPU, for which that name stands.

        Args:
            backends: that were asked for by name.
            listener: is warned of a GPU that PyTorch cannot use.

        Raises:
            UsageError, MissingError: the device is unknown or not in this machine.
        """
        if self.device == "auto" and "ort" not in backends and (reason := unused_gpu()):
            listener(Warned(reason))
        name = "cpu" if self.device == "auto" and "ort" in backends else self.device
        return replace(self, device=str(find_device(name)))

    def device_of(self, backend: str) -> torch.device:
        """Return the device that `backend` runs on."""
        if backend == "ort":
            return torch.device("cpu")
        wanted = torch.device(self.device)
        return torch.device("cuda") if backend in ON_GPU and wanted.type != "cuda" else wanted

    def require_possible(self, backends: Sequence[str]) -> None:
        """Check that these backends exist and can run with this setting on this machine.

        Raises:
            UsageError: there is no such backend, or one of them lacks an option.
            MissingError: the device is not here.
        """
        if unknown := [name for name in backends if name not in BACKENDS]:
            raise UsageError(f"unknown backend {', '.join(unknown)}: choose from {', '.join(BACKENDS)}.")
        device, eager = torch.device(self.device), _WITH_LAYOUT & set(backends)
        if device.type == "cuda" and "ort" in backends:
            raise UsageError("ort is ONNX Runtime on the CPU; on a GPU its backends are ort-cuda and ort-trt.")
        if self.precision not in _TORCH_DTYPES and eager:
            known = ", ".join(_TORCH_DTYPES)
            raise UsageError(f"PyTorch runs {known} here, not {self.precision}: leave out {_join(eager)}.")
        if self.channels_last and (others := set(backends) - _WITH_LAYOUT):
            raise UsageError(f"--channels-last is for torch and compile: {_join(others)} chooses its own layout.")
        if self.cuda_graph and (others := set(backends) - _WITH_GRAPH):
            raise UsageError(f"--cuda-graph is for {_join(_WITH_GRAPH)}, not for {_join(others)}.")
        if self.cuda_graph and device.type == "cpu" and eager:
            raise UsageError("--cuda-graph needs a GPU, and this is measured on the CPU: see --device.")
        if device.type == "cuda":
            find_device(self.device)

    def convert_(self, module: nn.Module) -> nn.Module:
        """Move `module` itself to the device, in this precision and memory format, and return it."""
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        return module.to(device=self.device, dtype=_TORCH_DTYPES[self.precision]).to(memory_format=layout)

    def to_host_batch(self, images: Tensor) -> Tensor:
        """Convert a batch to this precision and memory format in host memory, pinned if it will be copied to a GPU."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        batch = images.to(dtype=_TORCH_DTYPES[self.precision], memory_format=layout)
        return batch.pin_memory() if torch.device(self.device).type == "cuda" else batch


def _join(names: set[str]) -> str:
    """Write names in alphabetical order, separated by commas."""
    return ", ".join(sorted(names))
