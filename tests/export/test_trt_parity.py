"""Engines are compared with their model on the GPU they were built on; here a fake engine computes on the CPU."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from secrets import token_bytes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from passdeploy.errors import ParityError
from passdeploy.export import Artifact, ExportSettings, Samples, export_artifacts, exporter, trt_parity
from passdeploy.export.artifact import describe_artifact
from passdeploy.export.drafts import Replacing, replacing_freely
from passdeploy.export.precision import LIMITS
from passdeploy.export.reference import Reference, compute_reference
from passdeploy.export.trt_parity import TF32_REL_ERROR, require_engine_parity
from passdeploy.export.trt_sidecar import read_sidecar, sidecar_path, write_sidecar
from passdeploy.runtime.events import Warned
from passdeploy.runtime.files import sha256_of

from .fake_engines import FAKE_TRT, FakeEngine
from .nets import SmallNet


@pytest.fixture
def reference(net: SmallNet, images: Tensor) -> Reference:
    return compute_reference(net, images, torch.arange(len(images)) % 2, batch_sizes=(1, 2, 5))


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(exporter, "has_gpu_of_torch", lambda: True)


def built(folder: Path, precision: str = "fp32", *, tf32: bool = True) -> Artifact:
    path = folder / "model.engine"
    path.write_bytes(b"native code")
    engine = describe_artifact(path, kind="engine", precision=precision, facts={"options": {"tf32": tf32}})
    write_sidecar(engine)
    return engine


def computing(net: SmallNet, monkeypatch: pytest.MonkeyPatch, *, off: float = 0.0) -> None:
    """Let every engine compute what the network does, with all outputs off by a share of the largest."""

    def compute(images: Tensor) -> Tensor:
        answers = net(images)
        return answers + off * answers.abs().max()

    outputs = net(torch.zeros(1, 3, 16, 16)).size(1)
    engine = FakeEngine(compute, (3, 16, 16), outputs)
    monkeypatch.setattr(trt_parity, "load_engine", lambda path, **_: (FAKE_TRT, engine))


def check(engine: Artifact, reference: Reference, precision: str = "fp32") -> Artifact:
    return require_engine_parity(engine, reference, LIMITS[precision], device="cpu")[0]


def test_what_was_measured_is_in_the_sidecar(
    net: SmallNet, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    computing(net, monkeypatch)
    engine = check(built(tmp_path), reference)
    parity = read_sidecar(engine.path)["parity"]
    assert parity == json.loads(json.dumps(engine.facts["parity"]))
    assert parity["max_rel_error"] < 1e-6
    assert parity["batch_sizes"] == [1, 2, 5]
    assert parity["ran"] == "TensorRT 11.4.0.106 on the GPU"
    assert parity["top1"] == parity["reference_top1"]


def test_an_engine_that_computes_something_else_is_set_aside(
    net: SmallNet, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    computing(net, monkeypatch, off=0.05)
    engine = built(tmp_path)
    with pytest.raises(ParityError, match=r"model\.engine differs from the PyTorch model by 5\.\de-02"):
        check(engine, reference)
    assert [path.name for path in tmp_path.iterdir()] == ["model.engine.rejected"]


def test_an_engine_that_returns_another_shape_is_set_aside(
    net: SmallNet, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    engine = FakeEngine(lambda images: torch.zeros(len(images), 3), (3, 16, 16), 3)
    monkeypatch.setattr(trt_parity, "load_engine", lambda path, **_: (FAKE_TRT, engine))
    with pytest.raises(ParityError, match="returns shape"):
        check(built(tmp_path), reference)
    assert not sidecar_path(tmp_path / "model.engine").exists()


@pytest.mark.parametrize(("tf32", "passes"), [(True, True), (False, False)])
def test_tf32_may_be_off_by_more(
    tf32: bool,
    passes: bool,
    net: SmallNet,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    off = 1e-3
    assert LIMITS["fp32"].rel_error < off < TF32_REL_ERROR
    computing(net, monkeypatch, off=off)
    engine = built(tmp_path, tf32=tf32)
    if passes:
        check(engine, reference)
        return
    with pytest.raises(ParityError):
        check(engine, reference)


@pytest.fixture
def a_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the exporter build engines whose comparison is a fake too."""
    monkeypatch.setattr("passdeploy.export.settings.load_trt", lambda flavour: None)

    def build(source: Path, path: Path, **_: Any) -> Artifact:
        path.write_bytes(token_bytes(8))
        facts = {"layers": 3, "options": {"tf32": True}, "onnx_sha256": sha256_of(source)}
        engine = describe_artifact(path, kind="engine", precision="fp32", facts=facts)
        write_sidecar(engine)
        return engine

    monkeypatch.setattr(exporter, "build_engine", build)


def export(
    net: SmallNet, images: Tensor, folder: Path, heard: list[Any], replacing: Replacing = replacing_freely, **asked: Any
) -> list[Artifact]:
    samples = Samples(images, images, (3, 16, 16), (0.0,) * 3, (1.0,) * 3)
    settings = ExportSettings(kinds=("onnx", "trt"), **asked)
    return list(export_artifacts(net, samples, folder, settings, replacing=replacing, listener=heard.append))


@pytest.mark.usefixtures("a_builder")
def test_an_export_compares_its_engines(net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compared: list[str] = []

    def compare(engine: Artifact, reference: Reference, limits: Any, final: Path) -> Any:
        assert not final.exists()  # it gets its name once it passes
        compared.append(engine.path.name)
        raise ParityError("differs")

    monkeypatch.setattr(exporter, "require_engine_parity", compare)
    with pytest.raises(ParityError, match="differs"):
        export(net, images, tmp_path, [])
    assert compared == ["model.engine"]
    assert export(net, images, tmp_path, [], flavour="rtx")[-1].kind == "engine"  # not for this machine's GPU
    assert compared == ["model.engine"]


@pytest.mark.usefixtures("a_builder")
def test_an_engine_that_fails_leaves_the_one_that_passed_before(
    net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exporter, "require_engine_parity", partial(require_engine_parity, device="cpu"))
    computing(net, monkeypatch)
    first = export(net, images, tmp_path, [], batch=(1, 2, 4))[-1]
    computing(net, monkeypatch, off=0.5)
    heard: list[Any] = []
    replaced: list[str] = []
    with pytest.raises(ParityError, match=r"model\.engine differs"):
        export(net, images, tmp_path, heard, replacing=lambda path: replaced.append(path.name), batch=(1, 2, 8))
    assert replaced == ["model.onnx"]
    assert read_sidecar(tmp_path / "model.engine")["sha256"] == first.sha256
    names = {"model.onnx", "model.engine", "model.engine.json"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "model.engine.rejected"}
    assert any("model.engine was built from an earlier model.onnx" in str(event) for event in heard)
    computing(net, monkeypatch)
    second = export(net, images, tmp_path, [], batch=(1, 2, 8))[-1]
    assert read_sidecar(second.path)["sha256"] == second.sha256 != first.sha256
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_draft_without_weights_gets_them_from_where_it_will_be(
    net: SmallNet, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "drafts").mkdir()
    engine = built(tmp_path / "drafts")
    asked: list[Any] = []

    def load(path: Path, **how: Any) -> Any:
        asked.append(how["onnx_folder"])
        return FAKE_TRT, FakeEngine(net, (3, 16, 16), net(torch.zeros(1, 3, 16, 16)).size(1))

    monkeypatch.setattr(trt_parity, "load_engine", load)
    require_engine_parity(engine, reference, LIMITS["fp32"], device="cpu", final=tmp_path / "model.engine")
    check(engine, reference)
    assert asked == [tmp_path, tmp_path / "drafts"]


@pytest.mark.usefixtures("a_builder")
def test_a_pytorch_without_the_gpu_is_said(
    net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exporter, "has_gpu_of_torch", lambda: False)
    heard: list[Any] = []
    engine = export(net, images, tmp_path, heard)[-1]
    assert "parity" not in engine.facts
    assert any(isinstance(event, Warned) and "was not compared" in event.text for event in heard)
