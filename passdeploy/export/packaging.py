"""Packaging of exported files: a model repository for Triton, a bundle for the machine that builds engines."""

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
    """The folders to write, relative to the folder of the export; None: not written."""

    triton: Path | None = None
    bundle: Path | None = None

    def write(
        self, folder: Path, artifacts: Sequence[Artifact], settings: ExportSettings, samples: Samples, *, name: str
    ) -> list[Artifact]:
        """Write the Triton repository and the bundle that are asked for, and return every file written.

        Args:
            folder: of the export, which the folders are relative to.
            artifacts: the exported files.
            settings: of the export.
            samples: normalised images, for the bundle.
            name: of the model in Triton.
        """
        written: list[Artifact] = []
        if self.triton is not None:
            written += write_repository(folder / self.triton, artifacts, name=name)
        if self.bundle is not None:
            written += write_bundle(folder / self.bundle, artifacts, settings, samples)
        return written
