"""Packaging of exported files: a model repository for Triton, a bundle for the machine that builds engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from passdeploy.export.artifact import Artifact
from passdeploy.export.bundle import require_buildable, write_bundle
from passdeploy.export.settings import ExportSettings, Samples
from passdeploy.export.triton import write_repository
from passdeploy.runtime.events import Listener, silent


@dataclass(frozen=True)
class Packaging:
    """The folders to write, relative to the folder of the export; None: not written."""

    triton: Path | None = None
    bundle: Path | None = None

    def require_possible(self, settings: ExportSettings) -> None:
        """Raise where the target could not build what a bundle asks it for; to be called before the export.

        Raises:
            UsageError: see `require_buildable`.
        """
        if self.bundle is not None:
            require_buildable(settings)

    def write(
        self,
        folder: Path,
        artifacts: Sequence[Artifact],
        settings: ExportSettings,
        samples: Samples,
        *,
        name: str,
        networks: Mapping[str, nn.Module],
        listener: Listener = silent,
    ) -> list[Artifact]:
        """Write the Triton repository and the bundle that are asked for, and return every file written.

        Args:
            folder: of the export, which the folders are relative to.
            artifacts: the exported files.
            settings: of the export.
            samples: normalised images, for the bundle.
            name: of the model in Triton.
            networks: that the files were exported from, for the bundle, by the first part of the files' names.
            listener: receives warnings.
        """
        written: list[Artifact] = []
        if self.triton is not None:
            written += write_repository(folder / self.triton, artifacts, name=name, listener=listener)
        if self.bundle is not None:
            written += write_bundle(folder / self.bundle, artifacts, settings, samples, networks=networks)
        return written
