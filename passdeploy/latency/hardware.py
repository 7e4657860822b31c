"""What a latency belongs to: a machine, a backend and how it was asked, and when two of them are the same."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from passdeploy.errors import UsageError
from passdeploy.profiling.environment import cpu_flags, cpu_model
from passdeploy.profiling.execution import Setting
from passdeploy.runtime.versions import package_versions

_PACKAGE = {"ort": ("onnxruntime", "onnxruntime-gpu"), "torch": ("torch",), "compile": ("torch",)}


@dataclass(frozen=True)
class MeasurementContext:
    """Where, and how, latencies were measured; they say nothing about another place."""

    processor: str  # the GPU, where the backend runs on one
    architecture: str
    instructions: str  # the widest vectors: "avx512", "avx2", "neon" or ""; of a GPU what it can compute: "sm_90"
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
        """This machine, whether or not it has the device."""
        setting, versions = setting or Setting(), package_versions()
        version = next((f"{name} {versions[name]}" for name in _PACKAGE.get(backend, ()) if name in versions), "none")
        processor, can = cpu_model() or "unknown", instructions()
        if setting.device_of(backend).type == "cuda":
            processor, can = _gpu(setting.device_of(backend))
            version = f"{version}, CUDA {torch.version.cuda}"
        return cls(
            processor=processor,
            architecture=platform.machine(),
            instructions=can,
            backend=backend,
            version=version,
            threads=threads,
            batch=batch,
            image_shape=tuple(image_shape),
            **asdict(setting),
        )

    @property
    def setting(self) -> Setting:
        """How networks are run here."""
        return Setting(self.device, self.precision, self.channels_last, self.cuda_graph)

    @property
    def words(self) -> str:
        """How it is run, in a few words."""
        how = "" if self.device == "cpu" else f" on {self.processor}"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}" if self.device == "cpu" else ""
        precision = "" if self.precision == "fp32" else self.precision
        parts = (f"{self.backend}{how}", precision, *self.setting.options, f"batch {self.batch}", threads)
        return ", ".join(part for part in parts if part)

    def key(self, *more: object) -> str:
        """A name for this context and for `more`, for files."""
        text = json.dumps([self.to_json(), *map(str, more)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def differences(self, other: MeasurementContext) -> list[str]:
        """What is different, in words: `processor: made on A, wanted is B`."""
        ours, theirs = self.to_json(), other.to_json()
        return [
            f"{name}: made with {ours[name]}, wanted is {theirs[name]}"
            for name in ours
            if name != "device" and ours[name] != theirs[name]
        ]  # a device is known by its processor, whatever its number is here

    def require(self, wanted: MeasurementContext, what: str) -> None:
        """Raise UsageError, which names the difference, unless `wanted` is this place."""
        if found := self.differences(wanted):
            raise UsageError(
                f"{what} is of another place. {'; '.join(found[:3])}.\n"
                "Make it again there with passdeploy profile --table, or use it all the same with --force."
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


def _gpu(device: torch.device) -> tuple[str, str]:
    """The name of a GPU, and what it can compute."""
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return "no such GPU", ""
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"sm_{major}{minor}"


def instructions() -> str:
    """The widest vectors that this processor has, as far as its kernels differ by them."""
    flags = cpu_flags()
    if "avx512f" in flags:
        return "avx512"
    if "avx2" in flags:
        return "avx2"
    return "neon" if platform.machine().lower() in ("arm64", "aarch64") else ""


def block_of(backend: str, setting: Setting | None = None) -> int:
    """How many channels the kernels of a backend compute together: what `round_to: auto` rounds to.

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
