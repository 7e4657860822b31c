"""Choice of the files of a run that are measured; whole runs are in test_prune.py and tests/test_cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from passdeploy.commands import profile_run
from passdeploy.errors import MissingError, RunError
from passdeploy.profiling import Candidate, Setting
from passdeploy.runtime.events import Event, silent


class Folder:
    """A stand-in for a run folder that has these files."""

    path = Path("runs/tiny-0001")

    def __init__(self, *names: str) -> None:
        self.names = names

    def has(self, name: str) -> bool:
        return name in self.names

    def verified(self, name: str) -> Path:
        return self.path / name


def candidate(folder: Any, backend: str, precision: str) -> Any:
    slim = Candidate("slim")
    return profile_run._with_form(slim, folder, backend, Setting(precision=precision), False, silent)


@pytest.mark.parametrize(
    ("backend", "precision", "names", "form", "expected"),
    [
        ("tensorrt", "fp32", ("model.engine", "model-rtx.engine"), "engine", "model.engine"),
        ("tensorrt", "fp16", ("model-fp16-rtx.engine",), "engine", "model-fp16-rtx.engine"),
        ("ort", "int8", ("model-int8.onnx", "model.onnx"), "onnx", "model-int8.onnx"),
        ("torch-trt", "bf16", ("model-bf16.pt2",), "program", "model-bf16.pt2"),
    ],
)
def test_the_file_of_the_precision_is_measured(
    backend: str, precision: str, names: tuple[str, ...], form: str, expected: str
):
    folder = Folder(*(f"export/{name}" for name in names))
    assert getattr(candidate(folder, backend, precision), form) == folder.path / "export" / expected


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("tensorrt", r"no export/model-fp16\.engine to measure\.\nWrite both.* --dense --trt --precision fp16"),
        ("ort-cuda", r"no export/model-fp16\.onnx to measure\.\nWrite both.* --dense --onnx --precision fp16"),
        ("torch-trt", r"no export/model-fp16\.pt2 to measure\.\nWrite both.* --dense --torch-trt --precision fp16"),
    ],
)
def test_what_was_not_exported_is_named_with_the_command(backend: str, words: str):
    with pytest.raises(RunError, match=words):
        candidate(Folder(), backend, "fp16")


def test_a_backend_that_was_not_named_is_left_out_if_its_file_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(profile_run, "load_network", lambda *_: nn.Identity())
    folder: Any = Folder("export/model.engine")
    gpu = Setting(device="cuda")
    monkeypatch.setattr(Setting, "require_possible", lambda self, backends: None)
    wanted = profile_run._default_backends(folder, gpu)
    assert wanted == ("torch", "compile", "ort-cuda", "tensorrt")
    heard: list[Event] = []
    monkeypatch.setattr(profile_run, "require_provider", lambda name: (_ for _ in ()).throw(MissingError(f"no {name}")))
    forms = profile_run._load_forms(folder, wanted, wanted, gpu, False, heard.append)
    assert forms.backends == ("torch", "compile")
    reasons = {skipped.backend: skipped.reason for skipped in forms.skipped}
    assert reasons["ort-cuda"] == "no CUDAExecutionProvider"  # and nothing was exported for it
    assert "has no export/dense.engine to measure. Write both networks" in reasons["tensorrt"]
    assert len(heard) == 2
    with pytest.raises(RunError, match=r"dense\.engine"):
        profile_run._load_forms(folder, ("torch", "tensorrt"), (), gpu, False, silent)
    with pytest.raises(MissingError, match="no CUDA"):
        profile_run._load_forms(folder, ("ort-cuda",), ("ort-cuda",), gpu, False, silent)
