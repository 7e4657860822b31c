"""The NVIDIA driver: its CUDA version and its GPUs, asked through libcuda with ctypes.

Some TensorRT libraries crash the process if no driver is installed, which no `except` can catch, so the driver is
checked before they are imported. Neither torch nor TensorRT is needed for that.
"""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from passdeploy.errors import MissingError

_SUCCESS, _NO_DEVICE = 0, 100  # CUresult
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_LINUX_DRIVER = Path("/proc/driver/nvidia/version")
# Oldest driver of each CUDA release; minor releases run on it too
# (https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html).
_OLDEST_DRIVER = {11: "450", 12: "525", 13: "580"}


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver of this machine."""

    cuda: tuple[int, int]  # newest CUDA version (major, minor) that it supports
    devices: tuple[str, ...]  # names of the visible GPUs


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use, in CUDA's order."""

    name: str
    uuid: str  # as NVML and `nvidia-smi -L` write it: "GPU-..."
    memory_mb: float  # MiB in all
    capability: tuple[int, int]  # compute capability: (9, 0) is sm_90


def probe_driver() -> Driver | None:
    """Ask the driver for its CUDA version and its GPUs; return None if there is no working driver."""
    cuda = _load_driver()
    if cuda is None:
        return None
    version = ctypes.c_int(0)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    names = tuple(_device_name(cuda, index) for index in range(_device_count(cuda)))
    return Driver((version.value // 1000, version.value % 1000 // 10), names)


def probe_gpus() -> tuple[Gpu, ...]:
    """Ask the driver for the visible GPUs with their memory and compute capability; none without a driver."""
    cuda = _load_driver()
    return () if cuda is None else tuple(_describe_gpu(cuda, index) for index in range(_device_count(cuda)))


def driver_version() -> str | None:
    """Read the release of the NVIDIA driver, such as `580.65.06`; None where the kernel does not say it."""
    try:
        text = _LINUX_DRIVER.read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def older_than(driver: Driver, toolkit: str) -> str | None:
    """Say in one sentence why a driver cannot run a CUDA toolkit such as `13.0`; None if it can."""
    major = int(toolkit.split(".")[0])
    if driver.cuda[0] >= major:
        return None
    release = driver_version()
    needed = f" (driver {_OLDEST_DRIVER[major]} or newer)" if major in _OLDEST_DRIVER else ""
    return (
        f"the NVIDIA driver{f' {release}' if release else ''} runs CUDA up to {driver.cuda[0]}.{driver.cuda[1]}, "
        f"and this PyTorch needs {toolkit}{needed}"
    )


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


def _load_driver() -> ctypes.CDLL | None:
    """Load and start the driver's library; None if there is no working driver."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        status = int(cuda.cuInit(0))
    except (OSError, AttributeError):
        return None
    return cuda if status in (_SUCCESS, _NO_DEVICE) else None


def _device_count(cuda: ctypes.CDLL) -> int:
    """Count the visible GPUs; 0 where the driver has found none."""
    count = ctypes.c_int(0)
    return count.value if int(cuda.cuDeviceGetCount(ctypes.byref(count))) == _SUCCESS else 0


def _describe_gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    """Read the facts of one GPU; what the driver does not say is empty or 0."""
    device, memory = ctypes.c_int(0), ctypes.c_size_t(0)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int(0)
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    raw = (ctypes.c_ubyte * 16)()
    get_uuid = getattr(cuda, "cuDeviceGetUuid_v2", None)  # since CUDA 11.4
    is_known = get_uuid is not None and int(get_uuid(raw, device)) == _SUCCESS
    uuid = _uuid_text(bytes(raw)) if is_known else ""
    return Gpu(_device_name(cuda, index), uuid, memory.value / 2**20, (capability[0], capability[1]))


def _uuid_text(raw: bytes) -> str:
    """Write the 16 bytes of a UUID as NVML does."""
    digits = raw.hex()
    return "GPU-" + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _device_name(cuda: ctypes.CDLL, index: int) -> str:
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    if int(cuda.cuDeviceGet(ctypes.byref(device), index)) != _SUCCESS:
        return f"GPU {index}"
    cuda.cuDeviceGetName(name, len(name), device)
    return name.value.decode(errors="replace")
