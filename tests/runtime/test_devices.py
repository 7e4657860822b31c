"""Devices by name, and the reasons why a GPU cannot be used, with stand-ins for the driver and for PyTorch's CUDA."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from passdeploy.errors import MissingError, UsageError
from passdeploy.runtime import cuda_driver, devices
from passdeploy.runtime.cuda_driver import Driver, Gpu


def machine(
    monkeypatch: pytest.MonkeyPatch,
    *,
    driver: Driver | None,
    usable: tuple[str, ...] = (),
    toolkit: str | None = "13.0",
) -> None:
    """Pretend to be a machine with this driver, on which PyTorch can use these GPUs."""
    monkeypatch.setattr(devices, "probe_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", toolkit)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(usable))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(usable))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: usable[index])
    monkeypatch.setattr(cuda_driver, "driver_version", lambda: "535.104.05")


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    machine(monkeypatch, driver=None)
    assert str(devices.find_device()) == "cpu"
    machine(monkeypatch, driver=Driver((13, 0), ("Imaginary GPU",)), usable=("Imaginary GPU",))
    assert str(devices.find_device()) == "cuda"
    assert [str(devices.find_device(name)) for name in ("cpu", "cuda", "cuda:0")] == ["cpu", "cuda", "cuda:0"]


@pytest.mark.parametrize(
    ("driver", "toolkit", "words"),
    [
        (None, "13.0", "there is no NVIDIA driver"),
        (Driver((13, 0), ()), "13.0", "the driver shows none"),
        (Driver((13, 0), ("GPU",)), None, "was built without CUDA"),
        (Driver((13, 0), ("GPU",)), "13.2", "CUDA does not start"),  # minor releases run on an older driver
        (
            *(Driver((12, 2), ("GPU",)), "13.0"),
            r"driver 535\.104\.05 runs CUDA up to 12\.2, and this PyTorch needs 13\.0 \(driver 580 or newer\)",
        ),
    ],
)
def test_why_no_gpu_can_be_used_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, driver: Driver | None, toolkit: str | None, words: str
):
    machine(monkeypatch, driver=driver, toolkit=toolkit)
    with pytest.raises(MissingError, match=words) as caught:
        devices.find_device("cuda")
    assert len(str(caught.value).splitlines()) <= 3


def test_a_number_that_is_not_there_is_told_apart_from_no_gpu(monkeypatch: pytest.MonkeyPatch):
    machine(monkeypatch, driver=Driver((13, 0), ("Imaginary GPU",)), usable=("Imaginary GPU",))
    with pytest.raises(MissingError, match=r"cuda:7, but 1 NVIDIA GPU is visible here: cuda:0 \(Imaginary GPU\)"):
        devices.find_device("cuda:7")
    with pytest.raises(UsageError, match="no device is called 'gpu'"):
        devices.find_device("gpu")


def test_a_gpu_that_pytorch_cannot_use_is_not_passed_over_in_silence(monkeypatch: pytest.MonkeyPatch):
    old = Driver((12, 2), ("Imaginary GPU",))
    machine(monkeypatch, driver=old)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(warnings.warn("too old", stacklevel=1)))
    assert str(devices.find_device("auto")) == "cpu"  # and PyTorch's own warning would have failed this test
    assert str(devices.unused_gpu()).startswith("Imaginary GPU is not used: the NVIDIA driver 535")
    machine(monkeypatch, driver=None)
    assert devices.unused_gpu() is None
    machine(monkeypatch, driver=old, usable=("Imaginary GPU",))
    assert devices.unused_gpu() is None


def test_the_release_of_the_driver_is_read_from_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    path = tmp_path / "version"
    monkeypatch.setattr(cuda_driver, "_LINUX_DRIVER", path)
    assert cuda_driver.driver_version() is None
    path.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\nGCC version:  gcc 12\n"
    )
    assert cuda_driver.driver_version() == "580.82.07"


def test_a_uuid_is_written_as_nvml_writes_it():
    assert cuda_driver._uuid_text(bytes(range(16))) == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"


class Library:
    """A stand-in for libcuda with one GPU; `has_uuid` is false for drivers before CUDA 11.4."""

    def __init__(self, *, has_uuid: bool) -> None:
        if has_uuid:
            self.cuDeviceGetUuid_v2 = self._uuid

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13010
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        name.value = b"Imaginary GPU"
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:
        memory._obj.value = 80 << 30
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    @staticmethod
    def _uuid(raw: Any, device: Any) -> int:
        raw[:] = range(16)
        return 0


@pytest.mark.parametrize(("has_uuid", "uuid"), [(True, "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"), (False, "")])
def test_the_driver_describes_its_gpus(has_uuid: bool, uuid: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda name: Library(has_uuid=has_uuid))
    assert cuda_driver.probe_driver() == Driver((13, 1), ("Imaginary GPU",))
    assert cuda_driver.probe_gpus() == (Gpu("Imaginary GPU", uuid, 81920.0, (9, 0)),)
