"""The one place that asks which device there is; everything else is handed one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from passdeploy.errors import MissingError, UsageError

if TYPE_CHECKING:
    import torch


def find_device(name: str = "auto") -> torch.device:
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`, as a device.

    Raises:
        UsageError: no such kind of device.
        MissingError: it is not here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"no device is called {name!r}: choose auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MissingError(
            f"asked for {name}, but {torch.cuda.device_count()} NVIDIA GPUs are visible here.\n"
            "Use --device cpu, or check the driver and CUDA_VISIBLE_DEVICES."
        )
    return device
