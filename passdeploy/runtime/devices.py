"""The choice of the device (CPU or GPU) by name; all other code is passed a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from passdeploy.errors import MissingError, UsageError

if TYPE_CHECKING:
    import torch


def find_device(name: str = "auto") -> torch.device:
    """Return the device for `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: no device has such a name.
        MissingError: this machine has no such GPU.
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
