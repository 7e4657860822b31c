"""What a latency belongs to: a machine, a backend and how it was asked, and when two of them are the same."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, fields

from passdeploy.errors import UsageError
from passdeploy.profiling.environment import cpu_flags, cpu_model
from passdeploy.versions import package_versions

_PACKAGE = {"ort": ("onnxruntime", "onnxruntime-gpu"), "torch": ("torch",)}


@dataclass(frozen=True)
class Place:
    """Where, and how, latencies were measured; they say nothing about another place."""

    processor: str
    architecture: str
    instructions: str  # the widest vectors: "avx512", "avx2", "neon" or ""
    backend: str
    version: str  # of the backend
    threads: int
    batch: int
    image: str  # "3x224x224"

    @classmethod
    def here(cls, *, backend: str, threads: int, batch: int, image_shape: tuple[int, ...]) -> Place:
        """This machine."""
        versions = package_versions()
        version = next((f"{name} {versions[name]}" for name in _PACKAGE.get(backend, ()) if name in versions), "none")
        return cls(
            processor=cpu_model() or "unknown",
            architecture=platform.machine(),
            instructions=instructions(),
            backend=backend,
            version=version,
            threads=threads,
            batch=batch,
            image="x".join(map(str, image_shape)),
        )

    def key(self, *more: object) -> str:
        """A name for this place and for `more`, for files."""
        text = json.dumps([asdict(self), *map(str, more)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def differences(self, other: Place) -> list[str]:
        """What is different, in words: `processor: made on A, wanted is B`."""
        return [
            f"{field.name}: made with {getattr(self, field.name)}, wanted is {getattr(other, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]

    def require(self, wanted: Place, what: str) -> None:
        """Raise UsageError, which names the difference, unless `wanted` is this place."""
        if found := self.differences(wanted):
            raise UsageError(
                f"{what} is of another place. {'; '.join(found[:3])}.\n"
                "Make it again there with passdeploy profile --table, or use it all the same with --force."
            )


def instructions() -> str:
    """The widest vectors that this processor has, as far as its kernels differ by them."""
    flags = cpu_flags()
    if "avx512f" in flags:
        return "avx512"
    if "avx2" in flags:
        return "avx2"
    return "neon" if platform.machine().lower() in ("arm64", "aarch64") else ""


def block_of(backend: str, precision: str = "fp32") -> int:
    """How many channels the kernels of a backend compute together: what `round_to: auto` rounds to.

    On x86, ONNX Runtime's blocked layout (NCHWc) and oneDNN, under PyTorch, fill one vector register: 16 float32 with
    AVX-512, 8 with AVX2. On NEON both work in fours; 8 keeps two of their registers busy. TensorRT wants 8 for fp16 and
    bf16, 32 for int8 (https://docs.nvidia.com/deeplearning/performance/dl-performance-convolutional/index.html).
    """
    if precision == "int8":
        return 32
    if backend == "tensorrt" or precision != "fp32":
        return 8
    return 16 if instructions() == "avx512" else 8
