"""Choice of the files of a run that are measured; whole runs are in test_prune.py and tests/test_cli.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from passdeploy.commands import measured_forms, profile_reuse, profile_run
from passdeploy.commands.prune import RunResult
from passdeploy.errors import MissingError, RunError, UsageError
from passdeploy.latency import measurement_context
from passdeploy.profiling import Candidate, Setting
from passdeploy.runs.folder import RunFolder
from passdeploy.runtime.events import Event, Warned, silent
from tests.conftest import copy_run


class Folder:
    """A stand-in for a run folder that has these files."""

    path = Path("runs/tiny-0001")

    def __init__(self, *names: str) -> None:
        self.names = names

    def has(self, name: str) -> bool:
        return name in self.names

    def verified(self, name: str) -> Path:
        return self.path / name


def form_of(folder: Any, backend: str, precision: str) -> Any:
    slim = Candidate("slim")
    setting = Setting(precision=precision)
    return measured_forms._with_form(slim, folder, backend, setting, False, pytest.fail, silent)


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
    assert getattr(form_of(folder, backend, precision), form) == folder.path / "export" / expected


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("tensorrt", r"no export/model-fp16\.engine to measure\.\nWrite both.* --trt --precision fp16 --run runs/tiny"),
        ("ort-cuda", r"no export/model-fp16\.onnx to measure\.\nWrite both.* --dense --onnx --precision fp16 --run"),
        ("torch-trt", r"no export/model-fp16\.pt2 to measure\.\nWrite both.* --dense --torch-trt --precision fp16"),
    ],
)
def test_what_was_not_exported_is_named_with_the_command(backend: str, words: str):
    with pytest.raises(RunError, match=words):
        form_of(Folder(), backend, "fp16")


def test_a_backend_that_was_not_named_is_left_out_if_its_file_is_missing(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise MissingError(f"no {name}")

    monkeypatch.setattr(measured_forms, "load_network", lambda *_: nn.Identity())
    folder: Any = Folder("export/model.engine")
    gpu = Setting(device="cuda")
    monkeypatch.setattr(Setting, "require_possible", lambda self, backends: None)
    wanted = measured_forms.backends_of_run(folder, gpu)
    assert wanted == ("torch", "compile", "ort-cuda", "tensorrt")
    heard: list[Event] = []
    monkeypatch.setattr(measured_forms, "require_provider", missing)
    forms = measured_forms.load_forms(folder, wanted, wanted, gpu, False, heard.append)
    assert forms.backends == ("torch", "compile")
    reasons = {skipped.backend: skipped.reason for skipped in forms.skipped}
    assert reasons["ort-cuda"] == "no CUDAExecutionProvider"  # and nothing was exported for it
    assert "has no export/dense.engine to measure. Write both networks" in reasons["tensorrt"]
    assert len(heard) == 2
    with pytest.raises(RunError, match=r"dense\.engine"):
        measured_forms.load_forms(folder, ("torch", "tensorrt"), (), gpu, False, silent)
    with pytest.raises(MissingError, match="no CUDA"):
        measured_forms.load_forms(folder, ("ort-cuda",), ("ort-cuda",), gpu, False, silent)


def test_a_damaged_profile_is_warned_of_and_measured_anew(tmp_path: Path):
    weights = {"dense": "a", "slim": "b"}
    heard: list[Event] = []
    with RunFolder.create(tmp_path, "tiny") as folder:
        folder.write_json("profile.json", {"asked": {"weights": weights}}, kind="profile")
        assert profile_reuse.earlier_profile(folder, weights, heard.append) == {"asked": {"weights": weights}}
        (folder.path / "profile.json").write_text("{}")
        assert profile_reuse.earlier_profile(folder, weights, heard.append) == {}
    assert len(heard) == 1
    assert isinstance(heard[0], Warned)
    assert "profile.json was damaged or edited: it is not used, and is written anew" in heard[0].text


class Profiled:
    """A run that is profiled without measuring: what would be measured and traced is noted."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.done = path, list[str]()
        self.left_out = ""  # a backend that cannot run
        with RunFolder.open(path, write=True) as folder:
            for name in ("model", "dense"):
                folder.write_text(f"export/{name}.onnx", "a graph", kind="onnx")
        monkeypatch.setattr(profile_run, "profile_pair", self.measure)
        monkeypatch.setattr(profile_run, "_trace", self.trace)
        monkeypatch.setattr(measured_forms, "load_network", lambda *_: nn.Identity())
        monkeypatch.setattr(profile_run, "renew_report", lambda *_: None)

    def measure(self, *_: object, backends: Sequence[str], **__: object) -> Any:
        self.done.append("latencies")
        rows = [{"backend": backend, "batch": 1} for backend in backends if backend != self.left_out]
        return SimpleNamespace(to_json=lambda: {"environment": {}, "rows": rows, "skipped": []})

    def trace(self, folder: RunFolder, candidates: object, backend: str, *_: object) -> dict[str, Any]:
        self.done.append(f"layers in {backend}")
        return {"layers": [backend], "groups": []}

    def profile(self, *backends: str, seconds: float = 1.0, layers: bool = True) -> dict[str, Any]:
        """Profile the run on the CPU, and forget what was done before."""
        self.done.clear()
        cpu = Setting("cpu")
        return profile_run.profile_run(
            self.path, backends=backends, batches=(1,), threads=1, setting=cpu, seconds=seconds, layers=layers
        )


@pytest.fixture
def run(tiny_run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Profiled:
    return Profiled(copy_run(tiny_run, tmp_path), monkeypatch)


def test_layers_are_added_to_latencies_that_were_measured_under_the_same_circumstances(run: Profiled):
    run.profile("torch", "ort", seconds=2.0, layers=False)
    assert run.profile("torch")["layers"] == ["torch"]
    assert run.done == ["layers in torch"]
    assert run.profile("torch", seconds=2.0)["layers"] == ["torch"]
    assert run.done == []
    run.profile("torch", seconds=3.0)  # that is longer than what was measured
    assert run.done == ["latencies", "layers in torch"]


def test_a_backend_that_was_left_out_is_measured_once_it_can_be(run: Profiled):
    run.left_out = "ort"
    run.profile("torch", "ort", layers=False)
    run.left_out = ""
    assert run.profile("ort")["layers"] == ["ort"]
    assert run.done == ["latencies", "layers in ort"]


def another_machine(run: Profiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement_context, "cpu_model", lambda: "Another CPU")


def other_versions(run: Profiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_reuse, "package_versions", lambda: {"onnxruntime": "99"})


def another_file(run: Profiled, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.open(run.path, write=True) as folder:
        folder.write_text("export/model.onnx", "another graph", kind="onnx")


@pytest.mark.parametrize("change", [another_machine, other_versions, another_file])
def test_figures_of_other_circumstances_are_not_shown_as_those_of_now(
    run: Profiled, monkeypatch: pytest.MonkeyPatch, change: Callable[[Profiled, pytest.MonkeyPatch], None]
):
    run.profile("ort")
    assert run.profile("ort", layers=False)["layers"] == ["ort"]
    change(run, monkeypatch)
    assert "layers" not in run.profile("ort", layers=False)
    assert run.profile("ort")["layers_of"]["backend"] == "ort"
    assert run.done == ["layers in ort"]


def test_a_machine_that_is_not_known_is_another_one(run: Profiled, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measurement_context, "cpu_model", lambda: None)
    for _ in range(2):
        run.profile("ort")
        assert run.done == ["latencies", "layers in ort"]


def test_layers_are_traced_in_the_first_backend_that_shows_them(run: Profiled):
    assert run.profile("ort-cuda", "ort")["layers_of"]["backend"] == "ort"
    assert run.done == ["latencies", "layers in ort"]
    with pytest.raises(UsageError, match="not into ort-cuda"):
        run.profile("ort-cuda")
    assert run.done == []  # nothing was measured in vain
