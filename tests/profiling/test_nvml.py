from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from passdeploy.profiling import nvml
from passdeploy.runtime.cuda_driver import Driver


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


def test_gpus_are_named_by_the_driver_where_nvml_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    def not_installed(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(nvml, "import_module", not_installed)
    monkeypatch.setattr(nvml, "probe_driver", lambda: Driver((13, 2), ("Imaginary GPU",)))
    assert nvml.read_gpus() == [{"name": "Imaginary GPU", "cuda": "13.2"}]


class Nvml(SimpleNamespace):
    """A fake NVML that answers every query with 1, except the power, which this GPU does not support."""

    closed = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("NVML_", "nvmlClocksThrottleReason")):
            return 1
        if name == "nvmlDeviceGetName":
            return lambda _: "Imaginary GPU"
        if name == "nvmlDeviceGetComputeRunningProcesses":
            return lambda _: [1, 2]
        if name == "nvmlDeviceGetPowerUsage":
            raise RuntimeError("not supported")
        if name == "nvmlShutdown":
            return lambda: setattr(self, "closed", True)
        return lambda *_: 1


def test_nvml_is_asked_and_closed(monkeypatch: pytest.MonkeyPatch):
    fake = Nvml()
    monkeypatch.setattr(nvml, "import_module", lambda name: fake)
    monkeypatch.setattr(nvml, "probe_driver", lambda: Driver((13, 2), ("Imaginary GPU",)))
    (gpu,) = nvml.read_gpus()
    assert (gpu["name"], gpu["processes"]) == ("Imaginary GPU", 2)
    assert (gpu["power_w"], gpu["power_limit_w"]) == (None, 1e-3)
    assert "SwPowerCap" in gpu["throttled_by"]
    assert fake.closed
