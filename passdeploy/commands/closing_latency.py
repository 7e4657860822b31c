"""The latency of dense and slim network at the end of a run."""

from __future__ import annotations

from typing import Any

import torch

from passdeploy.profiling import Candidate, Setting, profile_pair
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.load import load_network
from passdeploy.runtime.events import Listener

LATENCY_SECONDS = 2.0  # for both networks together


def measure_closing_latency(
    folder: RunFolder, image_shape: tuple[int, int, int], device: torch.device, *, allow_code: bool, listener: Listener
) -> list[dict[str, Any]]:
    """Measure the networks of a run briefly in PyTorch, and return rows as in `profile.json`.

    Args:
        folder: of the run; it has `dense.safetensors` and `slim.safetensors`.
        image_shape: (channels, height, width).
        device: where they run.
        allow_code: as for `load`.
        listener: hears of the measurement.
    """
    dense, slim = (
        Candidate(name, load_network(folder, name, allow_code), weights=f"{name}.safetensors")
        for name in ("dense", "slim")
    )
    profile = profile_pair(
        dense,
        slim,
        image_shape=image_shape,
        backends=("torch",),
        batches=(8,),
        setting=Setting(device=str(device)),
        seconds=LATENCY_SECONDS,
        listener=listener,
    )
    rows: list[dict[str, Any]] = profile.to_json()["rows"]
    return rows
