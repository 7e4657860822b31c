"""Lines that describe the GPUs of a machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def gpu_lines(gpus: Iterable[Mapping[str, Any]]) -> list[str]:
    """Describe each GPU of `passdeploy doctor` in a line: name, memory, compute capability, driver and CUDA.

    A second line says why PyTorch cannot use it, and a third who else does.
    """
    lines = []
    for gpu in gpus:
        driver = f"driver {gpu['driver']}" if gpu.get("driver") else "driver of unknown version"
        made_for = f"PyTorch is built for {gpu['torch_cuda']}" if gpu["torch_cuda"] else "PyTorch is built without CUDA"
        lines.append(
            f"{gpu['device']:<28} {gpu['name']}, {gpu['memory_mb'] / 1024:.1f} GiB, "
            f"compute capability {gpu['compute_capability']}, {driver} for CUDA up to {gpu['cuda']}; {made_for}"
        )
        if gpu["why"]:
            lines.append(f"{'':<28} {' '.join(gpu['why'].split())}")
        if others := gpu.get("other_processes"):
            lines.append(f"{'':<28} in use by {len(others)} other process{'es' if len(others) > 1 else ''}")
    return lines
