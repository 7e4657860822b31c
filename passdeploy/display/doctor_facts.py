"""Findings of `passdeploy doctor`, as names with what is known of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from passdeploy.display.listing import Facts


def doctor_facts(found: Mapping[str, Any]) -> Facts:
    """Lay out what `commands.doctor.examine` found: packages, GPUs, backends that start, commands that can run."""
    starts = [
        (f"backend {name}", f"starts on {start['device']}" if start["ok"] else f"no: {start['why']}")
        for name, start in found["starts"].items()
    ]
    can = [(name, "yes" if check["ok"] else f"no: {check['why']}") for name, check in found["can"].items()]
    gpus = list(gpu_facts(found["gpus"])) or [("GPU", "none")]
    torch_tensorrt = [
        ("Torch-TensorRT", found["torch_tensorrt_installed"]),
        *_made_for_each_other(found["torch_tensorrt"], found["versions"].get("torch", "")),
    ]
    return Facts((*found["versions"].items(), *gpus, *starts, *can, *torch_tensorrt))


def gpu_facts(gpus: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Describe each GPU: memory, compute capability, driver and CUDA; why PyTorch cannot use it; who else does."""
    for gpu in gpus:
        driver = f"driver {gpu['driver']}" if gpu.get("driver") else "driver of unknown version"
        made_for = f"PyTorch is built for {gpu['torch_cuda']}" if gpu["torch_cuda"] else "PyTorch is built without CUDA"
        yield (
            gpu["device"],
            f"{gpu['name']}, {gpu['memory_mb'] / 1024:.1f} GiB, compute capability {gpu['compute_capability']}, "
            f"{driver} for CUDA up to {gpu['cuda']}; {made_for}",
        )
        if gpu["why"]:
            yield "", " ".join(gpu["why"].split())
        if others := gpu.get("other_processes"):
            yield "", f"in use by {len(others)} other process{'es' if len(others) > 1 else ''}"


def _made_for_each_other(matrix: list[Mapping[str, str]], torch_version: str) -> Iterator[tuple[str, str]]:
    """Name the releases that go with the installed torch, or the newest that go together."""
    fitting = [row for row in matrix if torch_version.startswith(f"{row['torch']}.")] or matrix[:1]
    for row in fitting:
        yield "  made for each other", ", ".join(f"{name} {release}" for name, release in row.items())
    if others := len(matrix) - len(fitting):
        yield "", f"and {others} other {'set' if others == 1 else 'sets'}, which --json lists"
