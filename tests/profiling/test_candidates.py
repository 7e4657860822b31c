from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from passdeploy.errors import UsageError
from passdeploy.profiling import Candidate, Setting, candidates
from passdeploy.profiling.candidates import make_runner
from passdeploy.profiling.program_file import has_tensorrt

IMAGES = torch.randn(2, 3, 4, 4)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    torch.export.save(torch.export.export(net, (IMAGES,)), tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


@pytest.mark.parametrize("backend", ["torch", "compile", "ort", "tensorrt", "torch-trt"])
def test_a_form_that_is_missing_is_named(backend: str):
    with pytest.raises(UsageError, match=rf"the dense network has no .* to run in {backend}"):
        make_runner(Candidate("dense"), backend, 1, Setting())


def test_a_program_of_torch_tensorrt_runs_once_its_operators_are_known(program: Path, monkeypatch: pytest.MonkeyPatch):
    steps: list[str] = []
    read = candidates.read_program
    monkeypatch.setattr(candidates, "load_torch_trt", lambda: steps.append("imported"))
    monkeypatch.setattr(candidates, "require_gpu_of_torch", lambda what: None)
    monkeypatch.setattr(candidates, "read_program", lambda path: steps.append("read") or read(path))
    monkeypatch.setattr(Setting, "device_of", lambda self, backend: torch.device("cpu"))
    runner: Any = make_runner(Candidate("slim", program=program), "torch-trt", 1, Setting(precision="fp16"))
    runner.prepare(IMAGES)
    runner.run()
    assert steps == ["imported", "read"]
    assert (runner.backend, runner.precision, runner.artifact) == ("torch-trt", "fp16", "model.pt2")
    assert runner.images.dtype == torch.float32  # its inputs are float32 in every precision


def test_a_program_is_captured_like_a_module(program: Path, monkeypatch: pytest.MonkeyPatch):
    replays: list[str] = []
    monkeypatch.setattr("passdeploy.profiling.runners.capture_graph", lambda work, what: lambda: replays.append(what))
    runner = make_runner(Candidate("slim", program=program), "torch", 1, Setting(cuda_graph=True))
    runner.prepare(IMAGES)
    runner.run()
    assert replays == ["model.pt2"]


def test_a_program_of_pytorch_is_moved_to_the_device(program: Path, monkeypatch: pytest.MonkeyPatch):
    moved: list[str] = []

    def move(exported: Any, device: str) -> Any:
        moved.append(device)
        return SimpleNamespace(module=lambda: lambda images: images)

    monkeypatch.setattr("torch.export.passes.move_to_device_pass", move)
    candidates.open_program(program, "torch", "cuda:1")
    assert moved == ["cuda:1"]


def test_tensorrt_inside_a_program_is_seen_without_opening_it(program: Path, tmp_path: Path):
    assert not has_tensorrt(program)
    with zipfile.ZipFile(tmp_path / "accelerated.pt2", "w") as archive:
        archive.writestr("accelerated/models/model.json", '{"target": "torch.ops.tensorrt.execute_engine.default"}')
    assert has_tensorrt(tmp_path / "accelerated.pt2")
    (tmp_path / "text.pt2").write_text("torch.ops.tensorrt.")
    assert not has_tensorrt(tmp_path / "text.pt2")
