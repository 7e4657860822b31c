"""How networks are run: on which device, in which precision and layout, with or without a CUDA graph.

It is the same for both networks of a comparison, and part of what a row of a profile says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from passdeploy.errors import UsageError
from passdeploy.runtime.devices import find_device

ON_GPU = ("ort-cuda", "ort-trt", "tensorrt", "torch-trt")  # backends that run nowhere else
BACKENDS = ("torch", "compile", "ort", *ON_GPU)
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_WITH_LAYOUT = {"torch", "compile"}
_WITH_GRAPH = {"torch", "compile", "tensorrt"}


@dataclass(frozen=True)
class Setting:
    """How networks are run."""

    device: str = "cpu"  # of PyTorch, eager and compiled; the other backends have theirs in their name
    precision: str = "fp32"  # PyTorch converts the network; files are taken in this precision
    channels_last: bool = False  # memory format of PyTorch's images and weights
    cuda_graph: bool = False  # one launch for the whole network

    @property
    def options(self) -> tuple[str, ...]:
        """What is not as usual, in the words of the command line."""
        named = {"channels-last": self.channels_last, "cuda-graph": self.cuda_graph}
        return tuple(name for name, is_on in named.items() if is_on)

    def device_of(self, backend: str) -> torch.device:
        """What `backend` runs on."""
        if backend == "ort":
            return torch.device("cpu")
        wanted = torch.device(self.device)
        return torch.device("cuda") if backend in ON_GPU and wanted.type != "cuda" else wanted

    def require_possible(self, backends: Sequence[str]) -> None:
        """These backends exist and can be run like this, here.

        Raises:
            UsageError: no such backend, or an option that one of them does not have.
            MissingError: the device is not here.
        """
        if unknown := [name for name in backends if name not in BACKENDS]:
            raise UsageError(f"unknown backend {', '.join(unknown)}: choose from {', '.join(BACKENDS)}.")
        device, eager = torch.device(self.device), _WITH_LAYOUT & set(backends)
        if device.type == "cuda" and "ort" in backends:
            raise UsageError("ort is ONNX Runtime on the CPU; on a GPU its backends are ort-cuda and ort-trt.")
        if self.precision not in _TYPES and eager:
            raise UsageError(f"PyTorch runs {', '.join(_TYPES)} here, not {self.precision}: leave out {_words(eager)}.")
        if self.channels_last and (others := set(backends) - _WITH_LAYOUT):
            raise UsageError(f"--channels-last is for torch and compile: {_words(others)} chooses its own layout.")
        if self.cuda_graph and (others := set(backends) - _WITH_GRAPH):
            raise UsageError(f"--cuda-graph is for {_words(_WITH_GRAPH)}, not for {_words(others)}.")
        if self.cuda_graph and device.type == "cpu" and eager:
            raise UsageError("--cuda-graph needs a GPU: add --device cuda.")
        if device.type == "cuda":
            find_device(self.device)

    def placed(self, module: nn.Module) -> nn.Module:
        """`module` itself, converted and moved."""
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        return module.to(device=self.device, dtype=_TYPES[self.precision]).to(memory_format=layout)

    def staged(self, images: Tensor) -> Tensor:
        """A batch in the memory of the host, as it will be on the device; pinned where it will be copied to a GPU."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        staged = images.to(dtype=_TYPES[self.precision], memory_format=layout)
        return staged.pin_memory() if torch.device(self.device).type == "cuda" else staged


def _words(names: set[str]) -> str:
    return ", ".join(sorted(names))
