"""Weights of an ONNX file are put into an engine, with a stand-in for TensorRT's refitter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from passdeploy.errors import CorruptArtifact, ExportError, RunError
from passdeploy.export import load_engine, trt_sidecar
from passdeploy.export.artifact import describe_artifact
from passdeploy.export.trt_log import BuilderLog
from passdeploy.export.trt_refit import refit_
from passdeploy.export.trt_sidecar import sidecar_path, write_sidecar
from passdeploy.runtime.files import sha256_of


class FakeTensorRT:
    """A TensorRT whose refitter fails on demand, and that writes down what it was asked to do."""

    __version__ = "11.4.0.106"
    ILogger = type("ILogger", (), {})

    def __init__(self, *, accepts: bool = True, missing: tuple[str, ...] = (), refits: bool = True) -> None:
        self.accepts, self.missing, self.refits = accepts, missing, refits
        self.done: list[str] = []

    def Runtime(self, logger: object) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: SimpleNamespace(plan=plan))

    def Refitter(self, engine: object, logger: object) -> Any:
        def refit() -> bool:
            self.done.append("refitted")
            return self.refits

        return SimpleNamespace(get_missing_weights=lambda: list(self.missing), refit_cuda_engine=refit)

    def OnnxParserRefitter(self, refitter: object, logger: object) -> Any:
        def read(path: str) -> bool:
            self.done.append(Path(path).name)
            return self.accepts

        error = SimpleNamespace(desc=lambda: "conv.weight has another shape")
        return SimpleNamespace(refit_from_file=read, num_errors=1, get_error=lambda index: error)


def refit(trt: FakeTensorRT) -> None:
    refit_(trt, object(), Path("model.onnx"), object(), BuilderLog(), "model.engine")  # type: ignore[arg-type]


def test_weights_are_read_before_the_engine_is_refitted():
    trt = FakeTensorRT()
    refit(trt)
    assert trt.done == ["model.onnx", "refitted"]


@pytest.mark.parametrize(
    ("trt", "words"),
    [
        (FakeTensorRT(accepts=False), r"does not take the weights of model\.onnx(.|\n)*another shape"),
        (
            FakeTensorRT(missing=("a", "b")),
            r"lacks 2 weights of model\.engine \(first 'a'\)",
        ),
        (FakeTensorRT(refits=False), "cannot be refitted"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(trt: FakeTensorRT, words: str):
    with pytest.raises(ExportError, match=words) as caught:
        refit(trt)
    assert str(caught.value).count("\n") < 3


@pytest.fixture
def stripped(tmp_path: Path) -> Path:
    """An engine without weights, beside its ONNX file."""
    graph, path = tmp_path / "model.onnx", tmp_path / "model.engine"
    graph.write_bytes(b"weights")
    path.write_bytes(b"native code")
    facts = {
        "flavour": "tensorrt",
        "tensorrt": FakeTensorRT.__version__,
        "options": {"weight_stripped": True},
        "onnx": "model.onnx",
        "onnx_sha256": sha256_of(graph),
    }
    write_sidecar(describe_artifact(path, kind="engine", precision="fp32", facts=facts))
    return path


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT()
    monkeypatch.setattr(trt_sidecar, "require_gpu", lambda purpose, hint: None)
    monkeypatch.setattr(trt_sidecar, "load_trt", lambda flavour: fake)
    return fake


def test_an_engine_without_weights_gets_them_from_its_onnx_file(stripped: Path, trt: FakeTensorRT):
    load_engine(stripped)
    assert trt.done == ["model.onnx", "refitted"]


def test_the_onnx_file_of_a_draft_is_in_the_folder_of_the_finished_files(stripped: Path, trt: FakeTensorRT):
    drafts = stripped.parent / "drafts"
    drafts.mkdir()
    for path in (stripped, sidecar_path(stripped)):
        path.rename(drafts / path.name)
    with pytest.raises(RunError, match="is not beside it"):
        load_engine(drafts / stripped.name)
    load_engine(drafts / stripped.name, onnx_folder=stripped.parent)
    assert trt.done == ["model.onnx", "refitted"]


def test_the_onnx_file_must_be_the_one_it_was_built_from(stripped: Path, trt: FakeTensorRT):
    (stripped.parent / "model.onnx").write_bytes(b"other weights")
    with pytest.raises(CorruptArtifact, match="not the file that it was built from"):
        load_engine(stripped)
    (stripped.parent / "model.onnx").unlink()
    with pytest.raises(RunError, match=r"model\.onnx is not beside it"):
        load_engine(stripped)
    assert trt.done == []
