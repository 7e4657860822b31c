from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from passdeploy.profiling import nvml
from passdeploy.runtime.cuda_driver import Driver, Gpu


def test_throttling_of_a_gpu_is_named_and_what_it_does_not_support_is_none():
    names = SimpleNamespace(
        nvmlClocksThrottleReasonSwPowerCap=4,
        nvmlClocksThrottleReasonHwSlowdown=8,
        nvmlClocksThrottleReasonSwThermalSlowdown=32,
    )
    assert nvml.throttle_reasons(names, 4 + 32 + 1) == ["SwPowerCap", "SwThermalSlowdown"]
    assert nvml.throttle_reasons(names, 1) == []  # idle

    def not_supported() -> None:
        raise RuntimeError("not supported")

    assert nvml.value_or_none(not_supported) is None


GPUS = (Gpu("Imaginary GPU", "GPU-1", 81920.0, (9, 0)),)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there is a driver with one visible GPU."""
    monkeypatch.setattr(nvml, "probe_driver", lambda: Driver((13, 2), ("Imaginary GPU",)))
    monkeypatch.setattr(nvml, "probe_gpus", lambda: GPUS)
    monkeypatch.setattr(nvml, "driver_version", lambda: "580.65.06")


FACTS = {
    "name": "Imaginary GPU",
    "cuda": "13.2",
    "driver": "580.65.06",
    "memory_mb": 81920,
    "compute_capability": "9.0",
}


def test_gpus_are_described_by_the_driver_where_nvml_is_not_installed(driver: None, monkeypatch: pytest.MonkeyPatch):
    def not_installed(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(nvml, "import_module", not_installed)
    assert nvml.read_gpus() == [FACTS]


class Nvml(SimpleNamespace):
    """A fake NVML with two GPUs, of which CUDA sees the second; it answers every other query with 1.

    This GPU does not support the query of its power.
    """

    closed = False
    pids = (71,)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return f"handle of {uuid}"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        assert handle == "handle of GPU-1"
        return [SimpleNamespace(pid=pid, usedGpuMemory=2 << 30) for pid in self.pids]

    def nvmlSystemGetProcessName(self, pid: int) -> bytes:
        return b"/usr/bin/python"

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("NVML_", "nvmlClocksThrottleReason")):
            return 1
        if name == "nvmlDeviceGetPowerUsage":
            raise RuntimeError("not supported")
        if name == "nvmlShutdown":
            return lambda: setattr(self, "closed", True)
        return lambda *_: 1


def test_nvml_is_asked_about_the_visible_gpu_and_closed(driver: None, monkeypatch: pytest.MonkeyPatch):
    fake = Nvml()
    monkeypatch.setattr(nvml, "import_module", lambda name: fake)
    (gpu,) = nvml.read_gpus()
    assert {**gpu, **FACTS, "driver": 1} == gpu
    assert (gpu["power_w"], gpu["power_limit_w"]) == (None, 1e-3)
    assert "SwPowerCap" in gpu["throttled_by"]
    assert gpu["other_processes"] == [{"pid": 71, "name": "/usr/bin/python", "memory_mb": 2048}]
    assert nvml.process_text(gpu["other_processes"][0]) == "python (process 71, 2,048 MiB)"
    assert fake.closed


def test_a_gpu_that_does_not_give_its_temperature_gives_the_rest(driver: None, monkeypatch: pytest.MonkeyPatch):
    class Guest(Nvml):
        def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
            raise RuntimeError("not supported")

    monkeypatch.setattr(nvml, "import_module", lambda name: Guest())
    (gpu,) = nvml.read_gpus()
    assert (gpu["temperature_c"], gpu["sm_clock_mhz"], gpu["other_processes"][0]["pid"]) == (None, 1, 71)


@pytest.mark.parametrize(
    ("pids", "has_context", "others"),
    [
        ((os.getpid(),), True, []),
        ((71, os.getpid()), True, [71]),
        ((71,), False, [71]),
        ((71,), True, []),  # in a container: this process under the number that it has outside
        ((71, 72), True, [72]),
    ],
)
def test_this_process_is_no_other(
    pids: tuple[int, ...], has_context: bool, others: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: has_context)
    processes = [SimpleNamespace(pid=pid) for pid in pids]
    assert [process.pid for process in nvml._without_this(processes)] == others
