from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from passdeploy.errors import MissingError, UsageError
from passdeploy.profiling import Setting, execution
from passdeploy.profiling.runners import TorchRunner
from passdeploy.runtime.events import Event, Warned

IMAGES = torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("given", "backends", "words"),
    [
        ({"precision": "int8"}, ("torch",), "PyTorch runs fp32, fp16, bf16 here, not int8"),
        ({"channels_last": True}, ("torch", "ort"), "--channels-last is for torch and compile: ort chooses"),
        ({"cuda_graph": True}, ("ort-cuda",), "--cuda-graph is for compile, tensorrt, torch, not for ort-cuda"),
        ({"cuda_graph": True}, ("torch",), "--cuda-graph needs a GPU"),
        ({"device": "cuda"}, ("torch", "ort"), "on a GPU its backends are ort-cuda and ort-trt"),
        ({}, ("onnx",), "unknown backend onnx"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(given: dict[str, Any], backends: tuple[str, ...], words: str):
    with pytest.raises(UsageError, match=words):
        Setting(**given).require_possible(backends)


def test_files_may_have_any_precision():
    Setting(precision="int8").require_possible(("ort", "tensorrt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU here")
def test_a_gpu_that_is_not_there_is_missing():
    with pytest.raises(MissingError, match="0 NVIDIA GPUs can be used"):
        Setting(device="cuda").require_possible(("torch",))


def test_every_backend_has_its_device():
    on_cpu, on_gpu = Setting(), Setting(device="cuda:1")
    assert [on_cpu.device_of(backend).type for backend in ("torch", "ort", "tensorrt")] == ["cpu", "cpu", "cuda"]
    assert [str(on_gpu.device_of(backend)) for backend in ("compile", "ort", "tensorrt")] == ["cuda:1", "cpu", "cuda:1"]


def test_a_network_is_converted_and_laid_out_and_the_original_is_not():
    net = nn.Conv2d(3, 4, 3)
    runner = TorchRunner("slim", net, setting=Setting(precision="bf16", channels_last=True))
    runner.prepare(IMAGES)
    runner.run()
    assert runner.module.weight.dtype == runner.images.dtype == torch.bfloat16
    assert runner.images.is_contiguous(memory_format=torch.channels_last)
    assert runner.module.weight.is_contiguous(memory_format=torch.channels_last)
    assert net.weight.dtype == torch.float32
    assert (runner.precision, runner.setting.options) == ("bf16", ("channels-last",))


def test_eager_replays_its_graph(monkeypatch: pytest.MonkeyPatch):
    replays: list[str] = []
    monkeypatch.setattr("passdeploy.profiling.runners.capture_graph", lambda work, what: lambda: replays.append(what))
    runner = TorchRunner("dense", nn.Identity(), setting=Setting(cuda_graph=True))
    runner.prepare(IMAGES)
    runner.run()
    assert replays == ["Identity"]


def gpu(monkeypatch: pytest.MonkeyPatch, *, is_there: bool) -> None:
    """Pretend that `auto` finds a GPU, or none."""

    def find(name: str) -> torch.device:
        return torch.device(("cuda" if is_there else "cpu") if name == "auto" else name)

    monkeypatch.setattr(execution, "find_device", find)
    monkeypatch.setattr(execution, "unused_gpu", lambda: None if is_there else "an old driver")


@pytest.mark.parametrize(
    ("is_there", "device", "backends", "expected"),
    [
        (True, "auto", (), "cuda"),
        (True, "auto", ("torch", "tensorrt"), "cuda"),
        (True, "auto", ("torch", "ort"), "cpu"),  # the name of ONNX Runtime on the CPU
        (True, "cpu", (), "cpu"),
        (True, "cuda:1", ("ort",), "cuda:1"),  # which `require_possible` refuses
        (False, "auto", (), "cpu"),
    ],
)
def test_the_target_is_the_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, is_there: bool, device: str, backends: tuple[str, ...], expected: str
):
    gpu(monkeypatch, is_there=is_there)
    heard: list[Event] = []
    resolved = Setting(device, precision="fp16").resolved(backends, heard.append)
    assert resolved == Setting(expected, precision="fp16")
    assert heard == ([] if is_there else [Warned("an old driver")])


def test_the_backends_of_a_device_are_those_that_make_sense_there():
    assert execution.default_backends(torch.device("cpu"), has_engine=True) == ("torch", "ort")
    gpu = torch.device("cuda")
    assert execution.default_backends(gpu) == ("torch", "compile", "ort-cuda")
    assert execution.default_backends(gpu, has_engine=True, has_program=True)[3:] == ("tensorrt", "torch-trt")
