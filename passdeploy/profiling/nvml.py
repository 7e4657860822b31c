"""The NVIDIA GPUs of this machine and what holds them back: through NVML, read and never changed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from passdeploy.runtime.cuda_driver import probe_driver


def read_gpus() -> list[dict[str, Any]]:
    """The NVIDIA GPUs: through NVML where nvidia-ml-py is installed, else by name alone."""
    driver = probe_driver()
    if driver is None or not driver.devices:
        return []
    cuda = f"{driver.cuda[0]}.{driver.cuda[1]}"
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, or no NVML beside the driver: the names are still worth having
        return [{"name": name, "cuda": cuda} for name in driver.devices]
    try:
        return [_nvml_facts(nvml, index, cuda) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def _nvml_facts(nvml: Any, index: int, cuda: str) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    return {
        "name": nvml.nvmlDeviceGetName(handle),
        "cuda": cuda,
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "power_w": asked(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
        "power_limit_w": asked(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3),
        "throttled_by": asked(lambda: throttles(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))),
        "processes": asked(lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle))),
    }


def throttles(nvml: Any, reasons: int) -> list[str]:
    """What holds the clocks down, in NVML's words; that the GPU is idle, or its clocks were set, is not among it."""
    names = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
    return [name for name in names if reasons & getattr(nvml, f"nvmlClocksThrottleReason{name}", 0)]


def asked(question: Callable[[], Any]) -> Any:
    """An answer of NVML, or None where this GPU or this user gets none."""
    try:
        return question()
    except Exception:  # its errors are classes of its own, made when it starts
        return None
