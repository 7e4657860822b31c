"""Measurement context of a latency: processor, backend and settings, and the comparison of two contexts."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from passdeploy.errors import UsageError
from passdeploy.profiling.environment import cpu_flags, cpu_model
from passdeploy.profiling.execution import Setting
from passdeploy.runtime.versions import package_versions

UNKNOWN_CPU = "unknown"
_OF_MACHINE = ("processor", "architecture", "instructions", "version")  # all else in a context is a setting
_BACKEND_PACKAGES = {
    "ort": ("onnxruntime", "onnxruntime-gpu"),
    "ort-cuda": ("onnxruntime-gpu", "onnxruntime"),
    "torch": ("torch",),
    "compile": ("torch",),
    "tensorrt": ("tensorrt-cu13-bindings", "tensorrt-cu12-bindings", "tensorrt"),
}


@dataclass(frozen=True)
class MeasurementContext:
    """Machine, backend and settings of a latency measurement; latencies hold for the same context only."""

    processor: str  # the GPU, where the backend runs on one
    architecture: str
    instructions: str  # widest vector instructions: "avx512", "avx2", "neon" or ""; of a GPU its architecture: "sm_90"
    backend: str
    version: str  # of the backend
    threads: int
    batch: int
    image_shape: tuple[int, ...]  # (channels, height, width)
    device: str = "cpu"  # or "cuda", "cuda:1", as PyTorch calls it here
    precision: str = "fp32"
    channels_last: bool = False
    cuda_graph: bool = False

    @classmethod
    def here(
        cls, *, backend: str, threads: int, batch: int, image_shape: tuple[int, ...], setting: Setting | None = None
    ) -> MeasurementContext:
        """Describe this machine; a GPU that it does not have is named "no such GPU"."""
        setting, versions = setting or Setting(), package_versions()
        packages = [name for name in _BACKEND_PACKAGES.get(backend, ()) if name in versions]
        version = f"{packages[0]} {versions[packages[0]]}" if packages else "none"
        processor, features = cpu_model() or UNKNOWN_CPU, instructions()
        if setting.device_of(backend).type == "cuda":
            processor, features = _describe_gpu(setting.device_of(backend))
            version = f"{version}, CUDA {torch.version.cuda}"
        return cls(
            processor=processor,
            architecture=platform.machine(),
            instructions=features,
            backend=backend,
            version=version,
            threads=threads,
            batch=batch,
            image_shape=tuple(image_shape),
            **{**asdict(setting), "device": str(setting.device_of(backend))},
        )

    @property
    def setting(self) -> Setting:
        """The execution setting: device, precision, memory layout and CUDA graphs."""
        return Setting(self.device, self.precision, self.channels_last, self.cuda_graph)

    @property
    def description(self) -> str:
        """Short description for progress lines: backend, device, precision, options, batch and threads."""
        device = "" if self.device == "cpu" else f" on {self.processor}"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}" if self.device == "cpu" else ""
        precision = "" if self.precision == "fp32" else self.precision
        parts = (f"{self.backend}{device}", precision, *self.setting.options, f"batch {self.batch}", threads)
        return ", ".join(part for part in parts if part)

    def key(self, *more: object) -> str:
        """Hash this context and `more` to a part of a file name."""
        text = json.dumps([self.to_json(), *map(str, more)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def differences(self, other: MeasurementContext) -> list[str]:
        """Describe every difference, first of the machine: `processor: made with A, wanted is B`."""
        return [*self.differences_of_machine(other), *self.differences_of_settings(other)]

    def differences_of_machine(self, other: MeasurementContext) -> list[str]:
        """Describe the differences of processor and software; a processor that is not known is never the same."""
        return self._describe(other, lambda name: name in _OF_MACHINE)

    def differences_of_settings(self, other: MeasurementContext) -> list[str]:
        """Describe the differences of backend, batch, image, threads and execution."""
        # devices are compared by their processor, not by their number on this machine
        return self._describe(other, lambda name: name not in _OF_MACHINE and name != "device")

    def _describe(self, other: MeasurementContext, is_compared: Callable[[str], bool]) -> list[str]:
        ours, theirs = self.to_json(), other.to_json()
        return [
            f"{name}: made with {ours[name]}, wanted is {theirs[name]}"
            for name in ours
            if is_compared(name) and (ours[name] != theirs[name] or (name == "processor" and ours[name] == UNKNOWN_CPU))
        ]

    def require(self, wanted: MeasurementContext, what: str, *, force: bool = False) -> None:
        """Raise UsageError, which names the differences, unless `wanted` is this context.

        Args:
            wanted: the context to plan for.
            what: is of this context, as the message names it.
            force: whether it may be of another machine; other settings are refused all the same.
        """
        if differences := self.differences_of_settings(wanted):
            raise UsageError(
                f"{what} was made with other settings. {'; '.join(differences[:3])}.\n"
                "Ask for those (prune.measure, data.image_size), or make it again: passdeploy profile --table"
            )
        if not force and (differences := self.differences_of_machine(wanted)):
            raise UsageError(
                f"{what} was made on another machine. {'; '.join(differences[:3])}.\n"
                "Make it again here with passdeploy profile --table, or plan by it without measuring: --force"
            )

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values; a file says `image: "3x224x224"`."""
        values = {("image" if name == "image_shape" else name): value for name, value in asdict(self).items()}
        return {**values, "image": "x".join(map(str, self.image_shape))}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> MeasurementContext:
        """Read what `to_json` wrote; KeyError, TypeError or ValueError where it is something else."""
        others = {name: value for name, value in document.items() if name != "image"}
        return cls(**others, image_shape=tuple(int(size) for size in document["image"].split("x")))


def _describe_gpu(device: torch.device) -> tuple[str, str]:
    """Return the name of a GPU and its architecture (`sm_90`)."""
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return "no such GPU", ""
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"sm_{major}{minor}"


def instructions() -> str:
    """Name the widest vector instructions of this processor, as far as kernels differ by them."""
    flags = cpu_flags()
    if "avx512f" in flags:
        return "avx512"
    if "avx2" in flags:
        return "avx2"
    return "neon" if platform.machine().lower() in ("arm64", "aarch64") else ""


def block_of(backend: str, setting: Setting | None = None) -> int:
    """Return the number of channels that the kernels of a backend compute together: `round_to: auto`.

    On x86, ONNX Runtime's blocked layout (NCHWc) and oneDNN, under PyTorch, fill one vector register: 16 float32 with
    AVX-512, 8 with AVX2. On NEON both work in fours; 8 keeps two of their registers busy. A GPU's tensor cores want 8
    for fp16 and bf16, 4 for TF32 and 32 for int8
    (https://docs.nvidia.com/deeplearning/performance/dl-performance-convolutional/index.html).
    """
    setting = setting or Setting()
    if setting.precision == "int8":
        return 32
    if setting.precision != "fp32" or setting.device_of(backend).type == "cuda":
        return 8
    return 16 if instructions() == "avx512" else 8
