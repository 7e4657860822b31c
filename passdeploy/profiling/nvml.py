"""NVIDIA GPUs of this process, read through NVML: clocks, power, temperature, throttling and who else uses them.

Nothing is changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch

from passdeploy.runtime.cuda_driver import Gpu, driver_version, probe_driver, probe_gpus


def read_gpus() -> list[dict[str, Any]]:
    """Read the state of the visible NVIDIA GPUs, in CUDA's order.

    Without NVML (nvidia-ml-py) it is only what the driver says: name, memory, compute capability and versions.
    """
    driver = probe_driver()
    if driver is None or not driver.devices:
        return []
    cuda, release = f"{driver.cuda[0]}.{driver.cuda[1]}", driver_version()
    gpus = [
        {
            "name": gpu.name,
            "cuda": cuda,
            "driver": release,
            "memory_mb": round(gpu.memory_mb),
            "compute_capability": ".".join(map(str, gpu.capability)),
        }
        for gpu in probe_gpus()
    ]
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, or the driver has no NVML
        return gpus
    try:
        for index, (facts, gpu) in enumerate(zip(gpus, probe_gpus(), strict=True)):
            facts |= value_or_none(partial(_nvml_facts, nvml, gpu, index)) or {}
        return gpus
    finally:
        nvml.nvmlShutdown()


def _nvml_facts(nvml: Any, gpu: Gpu, index: int) -> dict[str, Any]:
    """Read the state of one GPU; a value that NVML does not give is None."""
    # NVML also counts GPUs that CUDA_VISIBLE_DEVICES hides, so the number of a GPU there may be another one.
    handle = nvml.nvmlDeviceGetHandleByUUID(gpu.uuid) if gpu.uuid else nvml.nvmlDeviceGetHandleByIndex(index)
    processes = value_or_none(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    return {
        "driver": value_or_none(lambda: nvml.nvmlSystemGetDriverVersion()),
        "sm_clock_mhz": value_or_none(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        "memory_clock_mhz": value_or_none(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        "temperature_c": value_or_none(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        "power_w": value_or_none(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
        "power_limit_w": value_or_none(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3),
        "throttled_by": value_or_none(
            lambda: throttle_reasons(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        ),
        "processes": None if processes is None else len(processes),
        "other_processes": [_describe_process(nvml, process) for process in _without_this(processes or ())],
    }


def _without_this(processes: Sequence[Any]) -> list[Any]:
    """Return the processes that NVML lists without this one."""
    others = [process for process in processes if process.pid != os.getpid()]
    # In a container NVML may list the numbers that processes have outside of it. One of them is then this process.
    is_listed_otherwise = len(others) == len(processes) and torch.cuda.is_initialized()
    return others[1:] if is_listed_otherwise else others


def _describe_process(nvml: Any, process: Any) -> dict[str, Any]:
    """Return the number, the name and the GPU memory in MiB of a process; None where this user may not know."""
    name = value_or_none(lambda: nvml.nvmlSystemGetProcessName(process.pid))
    used = process.usedGpuMemory
    return {
        "pid": process.pid,
        "name": name.decode(errors="replace") if isinstance(name, bytes) else name,
        "memory_mb": None if used is None else round(used / 2**20),
    }


def process_text(process: Mapping[str, Any]) -> str:
    """Describe a process of `other_processes`: `python (process 71, 2,048 MiB)`."""
    memory = "" if process["memory_mb"] is None else f", {process['memory_mb']:,} MiB"
    return f"{os.path.basename(process['name'] or 'a program')} (process {process['pid']}{memory})"


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
