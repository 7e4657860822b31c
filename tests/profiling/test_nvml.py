from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from passdeploy.profiling import nvml
from passdeploy.runtime.cuda_driver import Driver


def test_what_holds_a_gpu_back_is_named_and_what_it_does_not_tell_is_none():
    names = SimpleNamespace(
        nvmlClocksThrottleReasonSwPowerCap=4, nvmlClocksThrottleReasonHwSlowdown=8,
        nvmlClocksThrottleReasonSwThermalSlowdown=32,
    )  # fmt: skip
    assert nvml.throttles(names, 4 + 32 + 1) == ["SwPowerCap", "SwThermalSlowdown"]
    assert nvml.throttles(names, 1) == []  # idle

    def not_supported() -> None:
        raise RuntimeError("not supported")

    assert nvml.asked(not_supported) is None


def test_gpus_are_named_by_the_driver_where_nvml_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    def not_installed(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(nvml, "import_module", not_installed)
    monkeypatch.setattr(nvml, "probe_driver", lambda: Driver((13, 2), ("Imaginary GPU",)))
    assert nvml.read_gpus() == [{"name": "Imaginary GPU", "cuda": "13.2"}]


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
    stand_in = Nvml()
    monkeypatch.setattr(nvml, "import_module", lambda name: stand_in)
    monkeypatch.setattr(nvml, "probe_driver", lambda: Driver((13, 2), ("Imaginary GPU",)))
    (found,) = nvml.read_gpus()
    assert (found["name"], found["processes"], found["power_w"], found["power_limit_w"]) == (
        "Imaginary GPU", 2, None, 1e-3,
    )  # fmt: skip
    assert "SwPowerCap" in found["throttled_by"]
    assert stand_in.closed
