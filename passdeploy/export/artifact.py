"""Records of exported files (`Artifact`), the batch sizes they are made for, and their file names.

An `Artifact` describes a file that exists; it does not open or load it. Its facts are plain JSON values:
the settings of the export, what the exporter produced, and what the parity check measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from passdeploy.errors import UsageError
from passdeploy.runtime.files import sha256_of


@dataclass(frozen=True)
class Artifact:
    """One exported file."""

    path: Path
    kind: str  # "onnx", "engine", "program"; "triton" or "bundle" for the files of such a folder
    precision: str  # that the network computes in: "fp32", "fp16", ...; "" for a file of a bundle
    sha256: str
    size_bytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    def with_facts(self, **facts: Any) -> Artifact:
        """Return a copy with `facts` added."""
        return replace(self, facts={**self.facts, **facts})

    def to_json(self) -> dict[str, Any]:
        """Return all fields but the path as JSON values."""
        return {
            "kind": self.kind,
            "precision": self.precision,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "facts": dict(self.facts),
        }


def describe_artifact(path: Path, *, kind: str, precision: str, facts: Mapping[str, Any]) -> Artifact:
    """Hash and measure a finished file, and return its `Artifact`."""
    return Artifact(path, kind, precision, sha256_of(path), path.stat().st_size, facts)


@dataclass(frozen=True)
class BatchRange:
    """The range of batch sizes that an exported file accepts."""

    smallest: int
    typical: int  # the size that a TensorRT engine is tuned for
    largest: int

    @classmethod
    def of(cls, sizes: Sequence[int]) -> BatchRange:
        """Make a range from `(min, opt, max)`.

        Raises:
            UsageError: `sizes` are not three integers with 1 <= min <= opt <= max.
        """
        if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise UsageError(
                f"batch {','.join(map(str, sizes))} is not a valid range: it needs 1 <= MIN <= OPT <= MAX.\n"
                "For example: --batch 1,8,32"
            )
        return cls(*sizes)

    @property
    def is_fixed(self) -> bool:
        """True if the range holds only one batch size."""
        return self.smallest == self.largest

    @property
    def parity_sizes(self) -> list[int]:
        """Batch sizes at which a file is compared with its model: all three, and 1 and 2 if they are in the range."""
        small = {size for size in (1, 2) if self.smallest <= size <= self.largest}
        return sorted(small | set(self.as_list()))

    def as_list(self) -> list[int]:
        """Return `[min, opt, max]`, the form in which it is written to metadata."""
        return [self.smallest, self.typical, self.largest]


def file_stem(prefix: str, precision: str) -> str:
    """Return the name, without its suffix, of the files of a precision: `model`, `model-fp16`."""
    return prefix if precision == "fp32" else f"{prefix}-{precision}"
