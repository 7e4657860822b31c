"""Is there an NVIDIA driver, and what does it see? Asked of the driver itself, before anything uses it.

Some TensorRT libraries crash the process where no driver is installed, and no `except` can catch
that; so this is asked first. It needs neither torch nor TensorRT, and changes nothing.
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

    cuda: tuple[int, int]  # newest CUDA (major, minor) it can run
    devices: tuple[str, ...]  # names of the visible GPUs


def probe_driver() -> Driver | None:
    """The driver, or None where there is none that works."""
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
    """The driver, with at least one GPU.

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
    """The driver runs CUDA `major`.

    Raises:
        MissingError: it is too old.
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
