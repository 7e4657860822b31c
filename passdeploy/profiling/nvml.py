"""NVIDIA GPUs of this machine, read through NVML: clocks, power, temperature and throttling; nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from passdeploy.runtime.cuda_driver import probe_driver


def read_gpus() -> list[dict[str, Any]]:
    """Read the state of the NVIDIA GPUs; only their names where NVML (nvidia-ml-py) is not available."""
    driver = probe_driver()
    if driver is None or not driver.devices:
        return []
    cuda = f"{driver.cuda[0]}.{driver.cuda[1]}"
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, or the driver has no NVML
        return [{"name": name, "cuda": cuda} for name in driver.devices]
    try:
        return [_nvml_facts(nvml, index, cuda) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def _nvml_facts(nvml: Any, index: int, cuda: str) -> dict[str, Any]:
    """Read the state of one GPU; a value that NVML does not give is None."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    return {
        "name": nvml.nvmlDeviceGetName(handle),
        "cuda": cuda,
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "power_w": value_or_none(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
        "power_limit_w": value_or_none(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3),
        "throttled_by": value_or_none(
            lambda: throttle_reasons(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        ),
        "processes": value_or_none(lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle))),
    }


def throttle_reasons(nvml: Any, reasons: int) -> list[str]:
    """Decode NVML's bit mask of the reasons for reduced clocks.

    An idle GPU, and clocks that a user has set, are no throttling and are left out.
    """
    names = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
    return [name for name in names if reasons & getattr(nvml, f"nvmlClocksThrottleReason{name}", 0)]


def value_or_none(query: Callable[[], Any]) -> Any:
    """Run a query of NVML; None where the GPU does not support it or this user may not ask."""
    try:
        return query()
    except Exception:  # the error classes of NVML exist only after it was initialised
        return None
