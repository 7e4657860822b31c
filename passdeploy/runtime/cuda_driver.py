"""The NVIDIA driver: its CUDA version and its GPUs, asked through libcuda with ctypes.

Some TensorRT libraries crash the process if no driver is installed, which no `except` can catch, so the driver is
checked before they are imported. Neither torch nor TensorRT is needed for that.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

from passdeploy.errors import MissingError

_SUCCESS, _NO_DEVICE = 0, 100  # CUresult


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver of this machine."""

    cuda: tuple[int, int]  # newest CUDA version (major, minor) that it supports
    devices: tuple[str, ...]  # names of the visible GPUs


def probe_driver() -> Driver | None:
    """Ask the driver for its CUDA version and its GPUs; return None if there is no working driver."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
        status = int(cuda.cuInit(0))
    except (OSError, AttributeError):
        return None
    if status not in (_SUCCESS, _NO_DEVICE):
        return None
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    if status == _SUCCESS:
        cuda.cuDeviceGetCount(ctypes.byref(count))
    names = tuple(_device_name(cuda, index) for index in range(count.value))
    return Driver((version.value // 1000, version.value % 1000 // 10), names)


def require_gpu(purpose: str, *, hint: str) -> Driver:
    """Return the driver, after checking that at least one GPU is visible.

    Raises:
        MissingError: no driver, or no visible GPU.
    """
    driver = probe_driver()
    if driver is None:
        raise MissingError(f"there is no NVIDIA driver here, and {purpose} needs the target GPU.\n{hint}")
    if not driver.devices:
        raise MissingError(
            f"there is an NVIDIA driver but no visible GPU, and {purpose} needs one.\n"
            "Look at CUDA_VISIBLE_DEVICES; a container needs --gpus all."
        )
    return driver


def require_cuda(driver: Driver, major: int, purpose: str) -> None:
    """Check that the driver supports CUDA `major`.

    Raises:
        MissingError: the driver is too old.
    """
    if driver.cuda[0] < major:
        raise MissingError(
            f"this NVIDIA driver runs CUDA up to {driver.cuda[0]}.{driver.cuda[1]}; {purpose} needs {major}.\n"
            "Update the driver: https://www.nvidia.com/drivers"
        )


def _device_name(cuda: ctypes.CDLL, index: int) -> str:
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    if int(cuda.cuDeviceGet(ctypes.byref(device), index)) != _SUCCESS:
        return f"GPU {index}"
    cuda.cuDeviceGetName(name, len(name), device)
    return name.value.decode(errors="replace")
