from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from passdeploy.export.driver import Driver
from passdeploy.profiling import gpus


def test_what_holds_a_gpu_back_is_named_and_what_it_does_not_tell_is_none():
    nvml = SimpleNamespace(
        nvmlClocksThrottleReasonSwPowerCap=4, nvmlClocksThrottleReasonHwSlowdown=8,
        nvmlClocksThrottleReasonSwThermalSlowdown=32,
    )  # fmt: skip
    assert gpus.throttles(nvml, 4 + 32 + 1) == ["SwPowerCap", "SwThermalSlowdown"]
    assert gpus.throttles(nvml, 1) == []  # idle

    def not_supported() -> None:
        raise RuntimeError("not supported")

    assert gpus.asked(not_supported) is None


def test_gpus_are_named_by_the_driver_where_nvml_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    def not_installed(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(gpus, "import_module", not_installed)
    monkeypatch.setattr(gpus, "probe_driver", lambda: Driver((13, 2), ("Imaginary GPU",)))
    assert gpus.read_gpus() == [{"name": "Imaginary GPU", "cuda": "13.2"}]


class Nvml(SimpleNamespace):
    """Answers every question with the same number, but for power, which this GPU does not tell."""

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
    nvml = Nvml()
    monkeypatch.setattr(gpus, "import_module", lambda name: nvml)
    monkeypatch.setattr(gpus, "probe_driver", lambda: Driver((13, 2), ("Imaginary GPU",)))
    (found,) = gpus.read_gpus()
    assert (found["name"], found["processes"], found["power_w"], found["power_limit_w"]) == (
        "Imaginary GPU", 2, None, 1e-3,
    )  # fmt: skip
    assert "SwPowerCap" in found["throttled_by"]
    assert nvml.closed
