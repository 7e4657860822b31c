"""An exported file and the facts that were established about it.

An Artifact describes a file that exists; it does not open, load or trust it. The facts are plain JSON
values: what the exporter asked for, what it found, and what the parity check measured.
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
    kind: str  # "onnx", "engine", "program", or a part of a delivery: "triton", "bundle"
    precision: str  # of the arithmetic inside: "fp32", "fp16", ...
    sha256: str
    size_bytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    def with_facts(self, **facts: Any) -> Artifact:
        """The same file with more known about it."""
        return replace(self, facts={**self.facts, **facts})

    def to_json(self) -> dict[str, Any]:
        """Plain values, all but the path."""
        return {
            "kind": self.kind,
            "precision": self.precision,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "facts": dict(self.facts),
        }


def describe_artifact(path: Path, *, kind: str, precision: str, facts: Mapping[str, Any]) -> Artifact:
    """The Artifact of a finished file: hashed and measured where it lies."""
    return Artifact(path, kind, precision, sha256_of(path), path.stat().st_size, facts)


@dataclass(frozen=True)
class BatchRange:
    """The batch sizes an artifact is made for."""

    smallest: int
    typical: int  # what an engine is tuned for
    largest: int

    @classmethod
    def of(cls, sizes: Sequence[int]) -> BatchRange:
        """From `(min, opt, max)`.

        Raises:
            UsageError: not three integers with 1 <= min <= opt <= max.
        """
        if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise UsageError(
                f"batch {','.join(map(str, sizes))} is no range: it takes 1 <= MIN <= OPT <= MAX.\n"
                "For example: --batch 1,8,32"
            )
        return cls(*sizes)

    @property
    def is_fixed(self) -> bool:
        """Whether only one batch size is asked for."""
        return self.smallest == self.largest

    @property
    def parity_sizes(self) -> list[int]:
        """The sizes at which an artifact is compared with its model: 1 and 2 where it takes them, and both ends."""
        small = {size for size in (1, 2) if self.smallest <= size <= self.largest}
        return sorted(small | {self.smallest, self.largest})

    def as_list(self) -> list[int]:
        """`[min, opt, max]`, as it is written to metadata."""
        return [self.smallest, self.typical, self.largest]


def file_stem(prefix: str, precision: str) -> str:
    """How the files of a precision are called: `model`, `model-fp16`."""
    return prefix if precision == "fp32" else f"{prefix}-{precision}"
