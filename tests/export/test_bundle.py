"""Tests of bundles: written without a GPU, verified by their hashes, built with TensorRT for RTX."""

from __future__ import annotations

import json
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from passdeploy.errors import CorruptArtifact, ParityError, RunError
from passdeploy.export import Artifact, EngineOptions, ExportSettings, Samples, export_artifacts, trt_parity
from passdeploy.export.artifact import describe_artifact
from passdeploy.export.bundle import build_bundle, write_bundle
from passdeploy.export.trt_parity import require_engine_parity
from passdeploy.export.trt_sidecar import write_sidecar
from passdeploy.runtime.files import sha256_of

from .fake_engines import FAKE_TRT, FakeEngine
from .nets import SmallNet

needs_builder = pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="extra rtx is not installed")


@pytest.fixture(scope="module")
def written(net: SmallNet, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    samples = Samples(images, images, (3, 16, 16), (0.5,) * 3, (0.25,) * 3, net(images).argmax(1))
    settings = ExportSettings(
        precisions=("fp16",),
        batch=(1, 2, 4),
        flavour="rtx",
        engine=EngineOptions(workspace_bytes=2**26, optimization_level=2, timing_cache=Path("of/this/machine")),
    )
    artifacts = list(export_artifacts(net, samples, folder / "export", settings))
    files = write_bundle(folder / "bundle", artifacts, settings, samples)
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
    assert manifest["options"]["timing_cache"] is None
    samples = safetensors.torch.load_file(bundle / "samples.safetensors")
    assert torch.equal(samples["calibration"], images)
    assert torch.allclose(samples["answers/model-fp16.onnx"], net(images), atol=0.01)
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

    def build(source: Path, path: Path, **_: Any) -> Artifact:
        path.write_bytes(b"native code")
        facts = {"layers": 3, "flavour": "tensorrt", "options": {"tf32": True}}
        engine = describe_artifact(path, kind="engine", precision="fp16", facts=facts)
        write_sidecar(engine)
        return engine

    monkeypatch.setattr("passdeploy.export.bundle.load_trt", lambda flavour: None)
    monkeypatch.setattr("passdeploy.export.bundle.build_engine_apart", build)
    monkeypatch.setattr("passdeploy.export.bundle.has_gpu_of_torch", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    on_cpu = partial(require_engine_parity, device="cpu")
    monkeypatch.setattr("passdeploy.export.bundle.require_engine_parity", on_cpu)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("off", [0.0, 0.2])
def test_the_target_compares_its_engine_with_the_answers_in_the_bundle(
    off: float, bundle: Path, net: SmallNet, monkeypatch: pytest.MonkeyPatch
):
    engine = FakeEngine(lambda images: net(images) * (1 + off), (3, 16, 16), net(torch.zeros(1, 3, 16, 16)).size(1))
    monkeypatch.setattr(trt_parity, "load_engine", lambda path, trust_engine: (FAKE_TRT, engine))
    if off:
        with pytest.raises(ParityError, match="differs from the PyTorch model by 2"):
            list(build_bundle(bundle, flavour="tensorrt"))
        return
    (built,) = build_bundle(bundle, flavour="tensorrt")
    assert built.facts["parity"]["real_images"] == 5
    assert built.facts["parity"]["batch_sizes"] == [1, 2, 4]
    assert built.facts["parity"]["top1"] == 1.0


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
    write_bundle(tmp_path / "bundle", artifacts, settings, samples)
    engine = FakeEngine(net, (3, 16, 16), net(torch.zeros(1, 3, 16, 16)).size(1))
    monkeypatch.setattr(trt_parity, "load_engine", lambda path, trust_engine: (FAKE_TRT, engine))
    (built,) = build_bundle(tmp_path / "bundle")
    assert built.facts["parity"]["real_images"] == 0
    assert built.facts["parity"]["images"] == 8
    assert built.facts["parity"]["max_rel_error"] < 1e-3


def test_the_noise_of_a_graph_that_takes_pixels_is_pixels(net: SmallNet, tmp_path: Path):
    samples, settings = Samples.empty((3, 16, 16), (0.5,) * 3, (0.25,) * 3), ExportSettings(takes_pixels=True)
    artifacts = list(export_artifacts(net, samples, tmp_path / "export", settings))
    write_bundle(tmp_path / "bundle", artifacts, settings, samples)
    noise = safetensors.torch.load_file(tmp_path / "bundle" / "samples.safetensors")["noise"]
    assert torch.equal(noise, noise.round())
    assert noise.std() > 32  # of 255
