"""The choice of the device (CPU or GPU) by name, and why a GPU cannot be used; all other code is passed a device."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from passdeploy.errors import MissingError, UsageError
from passdeploy.runtime.cuda_driver import older_than, probe_driver

if TYPE_CHECKING:
    import torch

_USE_THE_CPU = "Use --device cpu, or"


def find_device(name: str = "auto") -> torch.device:
    """Return the device for `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: no device has such a name.
        MissingError: this machine has no such GPU, or PyTorch cannot use it.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if _count_gpus() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"no device is called {name!r}: choose auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= (count := _count_gpus()):
        if count:
            names = ", ".join(f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(count))
            raise MissingError(
                f"asked for {name}, but {count} NVIDIA GPU{'s are' if count > 1 else ' is'} visible here: {names}.\n"
                "Choose one of these, or look at CUDA_VISIBLE_DEVICES."
            )
        reason, advice = _why_no_gpu()
        raise MissingError(f"asked for {name}, but 0 NVIDIA GPUs can be used here: {reason}.\n{advice}")
    return device


def unused_gpu() -> str | None:
    """Say why PyTorch cannot use the NVIDIA GPU of this machine; None if it can, or if there is no GPU."""
    driver = probe_driver()
    if driver is None or not driver.devices or _count_gpus():
        return None
    reason, advice = _why_no_gpu()
    return f"{driver.devices[0]} is not used: {reason}.\n{advice}"


def _count_gpus() -> int:
    """Count the GPUs that PyTorch can use."""
    import torch

    with warnings.catch_warnings():  # PyTorch warns of an old driver; our own messages say more
        warnings.simplefilter("ignore")
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _why_no_gpu() -> tuple[str, str]:
    """Return the reason why PyTorch sees no GPU, and what to do."""
    import torch

    driver = probe_driver()
    if driver is None:
        return "there is no NVIDIA driver", f"{_USE_THE_CPU} install the driver; a container needs --gpus all."
    if not driver.devices:
        return "the driver shows none", f"{_USE_THE_CPU} look at CUDA_VISIBLE_DEVICES; a container needs --gpus all."
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA", f"{_USE_THE_CPU} install a PyTorch with CUDA."
    if problem := older_than(driver, torch.version.cuda):
        return problem, f"Update the driver, or install a PyTorch that was built for CUDA {driver.cuda[0]}."
    return "CUDA does not start", f"{_USE_THE_CPU} see what `python -c 'import torch; torch.cuda.init()'` says."
