"""What is gathered from exported files once they are there: a model repository for Triton, a bundle for the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from passdeploy.export.artifact import Artifact
from passdeploy.export.bundle import write_bundle
from passdeploy.export.settings import ExportSettings, Samples
from passdeploy.export.triton import write_repository


@dataclass(frozen=True)
class Packaging:
    """Which of them to write, and where: folders relative to that of the export."""

    triton: Path | None = None
    bundle: Path | None = None

    def write(
        self, home: Path, artifacts: Sequence[Artifact], settings: ExportSettings, samples: Samples, *, name: str
    ) -> list[Artifact]:
        """Write them; `name` is what Triton calls the model. Returns every file that was written."""
        written: list[Artifact] = []
        if self.triton is not None:
            written += write_repository(home / self.triton, artifacts, name=name)
        if self.bundle is not None:
            written += write_bundle(home / self.bundle, artifacts, settings, samples)
        return written
