from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from torch import Tensor

from passdeploy.errors import MissingError, ParityError, UsageError
from passdeploy.events import Event, StageFinished, Warned
from passdeploy.export import export_artifacts, run_export

from .nets import SmallNet


@pytest.mark.rtx
@pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="extra rtx is not installed")
def test_onnx_then_parity_then_engine(net: SmallNet, images: Tensor, tmp_path: Path):
    events: list[Event] = []
    graph, engine = export_artifacts(
        net,
        images=images,
        folder=tmp_path / "export",
        which={"trt"},
        flavour="rtx",
        batch=(1, 2, 4),
        tell=events.append,
    )
    assert [event.stage for event in events if isinstance(event, StageFinished)] == ["export", "parity", "engine"]
    assert graph.facts["parity"]["max_rel_error"] < 1e-4
    assert engine.facts["onnx_sha256"] == graph.sha256
    files = sorted(file.name for file in (tmp_path / "export").iterdir())
    assert files == ["model-rtx.engine", "model-rtx.engine.json", "model.onnx"]


def test_a_graph_that_fails_parity_never_becomes_an_engine(
    net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def disagree(*_: object, **__: object) -> None:
        raise ParityError("model.onnx differs")

    monkeypatch.setattr(run_export, "load_trt", lambda flavour: None)
    monkeypatch.setattr(run_export, "check_parity", disagree)
    monkeypatch.setattr(run_export, "find_spec", lambda name: True)
    with pytest.raises(ParityError):
        export_artifacts(net, images=images, folder=tmp_path, which={"onnx", "trt"})
    assert not list(tmp_path.glob("*.engine"))


def test_a_missing_tensorrt_is_found_before_anything_is_written(
    net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def missing(flavour: str) -> None:
        raise MissingError("no TensorRT")

    monkeypatch.setattr(run_export, "load_trt", missing)
    with pytest.raises(MissingError):
        export_artifacts(net, images=images, folder=tmp_path / "export", which={"trt"})
    assert not (tmp_path / "export").exists()


def test_without_onnxruntime_the_user_hears_that_nothing_was_compared(
    net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    events: list[Event] = []
    monkeypatch.setattr(run_export, "find_spec", lambda name: None)
    (artifact,) = export_artifacts(net, images=images, folder=tmp_path, prefix="dense", tell=events.append)
    assert artifact.path.name == "dense.onnx"
    assert "parity" not in artifact.facts
    assert any(isinstance(event, Warned) and "not compared" in event.text for event in events)


def test_an_unknown_kind_is_refused(net: SmallNet, images: Tensor, tmp_path: Path):
    with pytest.raises(UsageError, match="choose from onnx, trt"):
        export_artifacts(net, images=images, folder=tmp_path, which={"coreml"})
