"""Saved state of a stage that is not finished, for `prune --resume`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from passdeploy.runs.artifacts import ArtifactFolder

if TYPE_CHECKING:
    from torch import Tensor


class RunCheckpoint:
    """The newest saved state of one unfinished stage: one file of tensors, with JSON facts in its header.

    A new state is written under a new name, and the old file is deleted after the new one is recorded, so that there
    is always one complete state.
    """

    def __init__(self, run: ArtifactFolder, stage: str) -> None:
        self._run, self._prefix = run, f"checkpoints/{_slug(stage)}-"

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the newest tensors and facts, verified; None if nothing was saved."""
        names = self._names()
        if not names:
            return None
        return self._run.read_tensors(names[-1]), json.loads(self._run.read_metadata(names[-1])["facts"])

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Save tensors and facts in place of earlier ones."""
        old = self._names()
        number = int(old[-1].removeprefix(self._prefix).split(".")[0]) + 1 if old else 1
        name = f"{self._prefix}{number:06d}.safetensors"
        header = {"facts": json.dumps(facts, allow_nan=False)}
        self._run.write_tensors(name, tensors, header, kind="checkpoint")
        for other in old:
            self._run.remove(other)

    def clear(self) -> None:
        """Delete all saved states of the stage."""
        for name in self._names():
            self._run.remove(name)

    def _names(self) -> list[str]:
        ours = re.compile(re.escape(self._prefix) + r"\d{6}\.safetensors")
        return sorted(name for name in self._run.manifest() if ours.fullmatch(name))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
