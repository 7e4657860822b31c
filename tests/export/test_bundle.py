"""Tests of bundles: written without a GPU, verified by their hashes, built with TensorRT for RTX."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from passdeploy.errors import CorruptArtifact, ParityError, RunError, UsageError
from passdeploy.export import Artifact, EngineOptions, ExportSettings, Samples, export_artifacts, trt_parity
from passdeploy.export.artifact import describe_artifact
from passdeploy.export.bundle import build_bundle, write_bundle
from passdeploy.export.precision import LIMITS
from passdeploy.export.trt_parity import require_engine_parity
from passdeploy.export.trt_sidecar import read_sidecar, write_sidecar
from passdeploy.runtime.events import Event, Warned
from passdeploy.runtime.files import sha256_of
from passdeploy.runtime.sealed_json import SEAL, sealed

from .fake_engines import FAKE_TRT, FakeEngine
from .nets import SmallNet

needs_builder = pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="extra rtx is not installed")


def samples_of(net: SmallNet, images: Tensor) -> Samples:
    """Make samples whose labels are the network's own answers."""
    return Samples(images, images, (3, 16, 16), (0.5,) * 3, (0.25,) * 3, net(images).argmax(1))


@pytest.fixture(scope="module")
def written(net: SmallNet, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    samples = samples_of(net, images)
    settings = ExportSettings(
        precisions=("fp16",),
        batch=(1, 2, 4),
        flavour="rtx",
        engine=EngineOptions(workspace_bytes=2**26, optimization_level=2, timing_cache=Path("of/this/machine")),
    )
    artifacts = list(export_artifacts(net, samples, folder / "export", settings))
    files = write_bundle(folder / "bundle", artifacts, settings, samples, networks={"model": net})
    assert {artifact.path for artifact in files} == set((folder / "bundle").iterdir())
    return folder / "bundle"


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    """Copy the bundle, so that a test may damage it."""
    return Path(shutil.copytree(written, tmp_path / "bundle"))


def test_a_bundle_holds_all_that_the_target_needs(bundle: Path, net: SmallNet, images: Tensor):
    manifest = json.loads((bundle / "manifest.json").read_text())
    (model,) = manifest["models"]
    assert model["sha256"] == sha256_of(bundle / "model-fp16.onnx")
    assert (model["precision"], model["batch"], model["input"]) == ("fp16", [1, 2, 4], {"images": ["batch", 3, 16, 16]})
    assert model["parity"]["top1_agreement"] == 1.0
    assert model["limits"] == asdict(LIMITS["fp16"])
    assert manifest["options"]["timing_cache"] is None
    samples = safetensors.torch.load_file(bundle / "samples.safetensors")
    assert torch.equal(samples["calibration"], images)
    torch.testing.assert_close(samples["pytorch/model"], net(images))  # not what the fp16 file answers
    script = (bundle / "build.sh").read_text()
    assert "passdeploy export --from-bundle . --flavour rtx" in manifest["commands"]
    assert "--onnx=model-fp16.onnx" in script
    assert "--minShapes=images:1x3x16x16 --optShapes=images:2x3x16x16 --maxShapes=images:4x3x16x16" in script
    assert "--memPoolSize=workspace:64M" in script
    assert "written" not in script  # no path of this machine


@pytest.mark.rtx
@needs_builder
def test_the_target_builds_it_as_it_was_asked_for(bundle: Path):
    (engine,) = build_bundle(bundle)
    assert engine.path == bundle / "model-fp16-rtx.engine"
    assert engine.facts["batch"] == [1, 2, 4]
    assert engine.facts["options"]["optimization_level"] == 2
    assert engine.facts["census"]["convolutions"] == {"fp16": 4}


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let TensorRT build files that a fake engine runs."""

    def build(source: Path, path: Path, *, precision: str, **_: Any) -> Artifact:
        path.write_bytes(b"native code")
        facts = {"layers": 3, "flavour": "tensorrt", "options": {"tf32": True}}
        engine = describe_artifact(path, kind="engine", precision=precision, facts=facts)
        write_sidecar(engine)
        return engine

    monkeypatch.setattr("passdeploy.export.bundle.load_trt", lambda flavour: None)
    monkeypatch.setattr("passdeploy.export.bundle.build_engine_apart", build)
    monkeypatch.setattr("passdeploy.export.bundle.has_gpu_of_torch", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    on_cpu = partial(require_engine_parity, device="cpu")
    monkeypatch.setattr("passdeploy.export.bundle.require_engine_parity", on_cpu)


def computing(net: SmallNet, monkeypatch: pytest.MonkeyPatch, *, off: float = 0.0) -> None:
    """Let every engine compute what the network does, off by a share."""
    engine = FakeEngine(lambda images: net(images) * (1 + off), (3, 16, 16), net(torch.zeros(1, 3, 16, 16)).size(1))
    monkeypatch.setattr(trt_parity, "load_engine", lambda path, **_: (FAKE_TRT, engine))


@pytest.mark.usefixtures("a_gpu")
def test_the_target_compares_its_engine_with_the_answers_of_pytorch(
    bundle: Path, net: SmallNet, monkeypatch: pytest.MonkeyPatch
):
    computing(net, monkeypatch)
    (built,) = build_bundle(bundle, flavour="tensorrt")
    parity = built.facts["parity"]
    assert parity["compared_with"] == "the PyTorch model"
    assert parity["max_rel_error"] < 1e-6  # what fp16 has lost on the way is not counted against the engine
    assert (parity["real_images"], parity["batch_sizes"], parity["top1"]) == (5, [1, 2, 4], 1.0)
    assert built.path == bundle / "model-fp16.engine"
    assert read_sidecar(built.path)["sha256"] == built.sha256


@pytest.mark.usefixtures("a_gpu")
def test_an_engine_that_fails_on_the_target_does_not_get_its_name(
    bundle: Path, net: SmallNet, monkeypatch: pytest.MonkeyPatch
):
    computing(net, monkeypatch, off=0.2)
    before = {path.name for path in bundle.iterdir()}
    with pytest.raises(ParityError, match="differs from the PyTorch model by 2"):
        list(build_bundle(bundle, flavour="tensorrt"))
    assert {path.name for path in bundle.iterdir()} - before == {"model-fp16.engine.rejected"}


@pytest.mark.usefixtures("a_gpu")
def test_the_limits_of_the_export_are_those_of_the_target(
    net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    samples, settings = samples_of(net, images), ExportSettings(batch=(1, 2, 4), fp32_tolerance=0.5)
    artifacts = list(export_artifacts(net, samples, tmp_path / "export", settings))
    write_bundle(tmp_path / "bundle", artifacts, settings, samples, networks={"model": net})
    computing(net, monkeypatch, off=0.2)  # by default an fp32 engine may be off by 5e-3
    (built,) = build_bundle(tmp_path / "bundle")
    assert built.facts["parity"]["max_rel_error"] == pytest.approx(0.2, rel=1e-3)


@pytest.mark.usefixtures("a_gpu")
def test_a_bundle_of_an_earlier_version_is_compared_with_its_onnx_file_and_says_so(
    net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    samples, settings = samples_of(net, images), ExportSettings(batch=(1, 2, 4))
    artifacts = list(export_artifacts(net, samples, tmp_path / "export", settings))
    write_bundle(tmp_path / "bundle", artifacts, settings, samples)  # without the network, as it was before
    path = tmp_path / "bundle" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["models"][0]["limits"], manifest[SEAL]
    path.write_text(sealed(manifest))
    computing(net, monkeypatch)
    heard: list[Event] = []
    (built,) = build_bundle(tmp_path / "bundle", listener=heard.append)
    assert built.facts["parity"]["compared_with"] == "its ONNX file"
    assert any(isinstance(event, Warned) and "has no answers of PyTorch" in event.text for event in heard)
    computing(net, monkeypatch, off=0.2)
    with pytest.raises(ParityError, match="differs from its ONNX file by 2"):
        list(build_bundle(tmp_path / "bundle"))


def test_a_bundle_that_no_target_could_build_is_not_written(net: SmallNet, images: Tensor, tmp_path: Path):
    settings = ExportSettings(flavour="rtx", engine=EngineOptions(refittable=True))
    with pytest.raises(UsageError, match="without --refittable"):
        write_bundle(tmp_path / "bundle", [], settings, samples_of(net, images))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["changed", "gone", "elsewhere", "no manifest"])
def test_a_damaged_bundle_is_not_built(damage: str, bundle: Path):
    expected: type[Exception] = CorruptArtifact
    if damage == "changed":
        (bundle / "model-fp16.onnx").write_bytes(b"another network")
    elif damage == "gone":
        (bundle / "samples.safetensors").unlink()
    elif damage == "elsewhere":
        text = (bundle / "manifest.json").read_text()
        (bundle / "manifest.json").write_text(text.replace('"model-fp16.onnx"', '"../export/model-fp16.onnx"'))
    else:
        (bundle / "manifest.json").unlink()
        expected = RunError
    with pytest.raises(expected):
        list(build_bundle(bundle))
    assert not list(bundle.glob("*.engine"))


@pytest.mark.usefixtures("a_gpu")
def test_without_images_noise_is_compared(net: SmallNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    samples, settings = Samples.empty((3, 16, 16), (0.0,) * 3, (1.0,) * 3), ExportSettings(batch=(4, 4, 4))
    artifacts = list(export_artifacts(net, samples, tmp_path / "export", settings))
    write_bundle(tmp_path / "bundle", artifacts, settings, samples, networks={"model": net})
    computing(net, monkeypatch)
    (built,) = build_bundle(tmp_path / "bundle")
    assert built.facts["parity"]["real_images"] == 0
    assert built.facts["parity"]["images"] == 8
    assert built.facts["parity"]["max_rel_error"] < 1e-3


def test_the_noise_of_a_graph_that_takes_pixels_is_pixels(net: SmallNet, tmp_path: Path):
    samples, settings = Samples.empty((3, 16, 16), (0.5,) * 3, (0.25,) * 3), ExportSettings(takes_pixels=True)
    artifacts = list(export_artifacts(net, samples, tmp_path / "export", settings))
    write_bundle(tmp_path / "bundle", artifacts, settings, samples, networks={"model": net})
    recorded = safetensors.torch.load_file(tmp_path / "bundle" / "samples.safetensors")
    noise = recorded["noise"]
    assert torch.equal(noise, noise.round())
    assert noise.std() > 32  # of 255
    torch.testing.assert_close(recorded["pytorch/model"], net((noise / 255 - 0.5) / 0.25), rtol=1e-4, atol=1e-5)
