"""Tests of bundles: written without a GPU, verified by their hashes, built with TensorRT for RTX."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from passdeploy.errors import CorruptArtifact, RunError
from passdeploy.export import EngineOptions, ExportSettings, Samples, export_artifacts
from passdeploy.export.bundle import build_bundle, write_bundle
from passdeploy.runtime.files import sha256_of

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


def test_a_bundle_holds_all_that_the_target_needs(bundle: Path, images: Tensor):
    manifest = json.loads((bundle / "manifest.json").read_text())
    (model,) = manifest["models"]
    assert model["sha256"] == sha256_of(bundle / "model-fp16.onnx")
    assert (model["precision"], model["batch"], model["input"]) == ("fp16", [1, 2, 4], {"images": ["batch", 3, 16, 16]})
    assert model["parity"]["top1_agreement"] == 1.0
    assert manifest["options"]["timing_cache"] is None
    samples = safetensors.torch.load_file(bundle / "samples.safetensors")
    assert torch.equal(samples["calibration"], images)
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
