"""What `passdeploy doctor` says of a machine with a GPU that PyTorch cannot use, with stand-ins for the driver."""

from __future__ import annotations

from typing import Any

import pytest

from passdeploy.commands import doctor
from passdeploy.errors import MissingExtra
from passdeploy.profiling import backend_start, nvml
from passdeploy.runtime import devices


def test_a_gpu_that_cannot_be_used_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    gpu: dict[str, Any] = {"name": "Imaginary GPU", "memory_mb": 8192, "compute_capability": "8.6", "cuda": "12.2"}
    monkeypatch.setattr(nvml, "read_gpus", lambda: [gpu])
    monkeypatch.setattr(devices, "unused_gpu", lambda: "the driver is too old")
    monkeypatch.setattr(backend_start, "try_backends", lambda device: {"torch": {"ok": True, "device": str(device)}})
    report = doctor.examine()
    (found,) = report["gpus"]
    assert {**found, **gpu} == found
    assert (found["device"], found["why"]) == ("cuda:0", "the driver is too old")
    assert report["starts"]["torch"]["ok"]


def test_a_package_that_is_not_installed_is_named_with_its_extra():
    with pytest.raises(MissingExtra, match=r"passdeploy\[demo\]"):
        doctor._require_installed("no_such_package", extra="demo")
    doctor._require_installed("json", extra="demo")
