"""Tests of exporting one model: order of the steps, parity checks, and refusals before anything is written."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from passdeploy.errors import MissingError, MissingExtra, ParityError, UsageError
from passdeploy.export import Artifact, BatchRange, EngineOptions, ExportSettings, Samples, export_artifacts, exporter
from passdeploy.export.artifact import describe_artifact
from passdeploy.export.onnx_graph import write_onnx
from passdeploy.export.ort_session import open_session
from passdeploy.export.preprocessing import OnPixels
from passdeploy.export.trt_sidecar import is_outdated, write_sidecar
from passdeploy.runtime.events import Event, StageFinished, Warned
from passdeploy.runtime.files import sha256_of

from .nets import SmallNet

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def samples_of(images: Tensor, net: SmallNet | None = None) -> Samples:
    """Make samples to check and to calibrate on; the labels are the network's own answers, so its accuracy is 1."""
    labels = None if net is None else net(images).argmax(1)
    return Samples(images, images, tuple(images.shape[1:]), MEAN, STD, labels)


def export(
    net: SmallNet, images: Tensor, folder: Path, listener=lambda event: None, **settings: object
) -> list[Artifact]:
    return list(export_artifacts(net, samples_of(images, net), folder, ExportSettings(**settings), listener=listener))


@pytest.mark.rtx
@pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="extra rtx is not installed")
def test_every_precision_is_exported_checked_and_built_in_turn(net: SmallNet, images: Tensor, tmp_path: Path):
    events: list[Event] = []
    written = export(
        net,
        images,
        tmp_path / "export",
        kinds=("onnx", "trt"),
        flavour="rtx",
        batch=(1, 2, 4),
        listener=events.append,
        precisions=("fp32", "fp16", "bf16", "int8"),
    )
    stages = [event.stage for event in events if isinstance(event, StageFinished)]
    assert stages == ["export", "parity", "engine"] * 4
    graphs, engines = written[::2], written[1::2]
    assert [graph.facts["parity"]["top1"] for graph in graphs] == [1.0] * 4
    assert [graph.facts["opset"] for graph in graphs] == [20, 20, 22, 20]
    precisions = ("fp32", "fp16", "bf16", "int8")
    assert [graph.facts["lint"]["convolutions"] for graph in graphs] == [{name: 5} for name in precisions]
    assert [engine.facts["census"]["convolutions"] for engine in engines] == [{name: 4} for name in precisions]
    assert [engine.facts["onnx_sha256"] for engine in engines] == [graph.sha256 for graph in graphs]
    names = {path.name for path in (tmp_path / "export").glob("*.onnx")}
    assert names == {"model.onnx", "model-fp16.onnx", "model-bf16.onnx", "model-int8.onnx"}


def test_normalisation_inside_the_graph_takes_pixels(net: SmallNet, images: Tensor, tmp_path: Path):
    (artifact,) = export(net, images, tmp_path, takes_pixels=True, batch=(1, 2, 4))
    pixels = OnPixels(net, MEAN, STD).pixels_of(images)
    assert pixels.min() >= 0
    assert pixels.max() <= 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    (logits,) = open_session(artifact.path, threads=1).run(None, {"images": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), net((pixels / 255 - mean) / std), rtol=1e-4, atol=1e-5)
    metadata = {entry.key: entry.value for entry in onnx.load(artifact.path).metadata_props}
    assert metadata["input_values"] == "RGB pixels, 0 to 255"


def test_the_metadata_stays_in_every_precision(net: SmallNet, images: Tensor, tmp_path: Path):
    settings = ExportSettings(precisions=("fp16", "int8"), batch=(1, 2, 4))
    known = {"classes": ["a", "b"], "run": "tiny-0001"}
    for artifact in export_artifacts(net, samples_of(images, net), tmp_path, settings, metadata=known):
        metadata = {entry.key: entry.value for entry in onnx.load(artifact.path).metadata_props}
        assert json.loads(metadata["classes"]) == ["a", "b"]
        assert (metadata["run"], metadata["precision"]) == ("tiny-0001", artifact.precision)
    assert not (tmp_path / "model.onnx").exists()  # fp32 was not asked for


def test_a_file_has_its_name_only_after_it_was_checked(
    net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "require_parity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(net, images, tmp_path, batch=(1, 2, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_fails_leaves_the_one_that_passed_before(
    net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (first,) = export(net, images, tmp_path, batch=(1, 2, 4))
    with pytest.raises(ParityError, match="differs"):
        export(net, images, tmp_path, batch=(1, 2, 8), fp32_tolerance=0.0)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.rejected"}
    assert sha256_of(tmp_path / "model.onnx") == first.sha256
    export(net, images, tmp_path, batch=(1, 2, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]  # the rejected file of before is deleted


def test_an_engine_of_an_earlier_graph_is_named(net: SmallNet, images: Tensor, tmp_path: Path):
    engine = tmp_path / "model-rtx.engine"
    engine.write_bytes(b"native code")
    write_sidecar(describe_artifact(engine, kind="engine", precision="fp32", facts={"onnx_sha256": "of another"}))
    events: list[Event] = []
    (graph,) = export(net, images, tmp_path, batch=(1, 2, 4), listener=events.append)
    warnings = [event.text for event in events if isinstance(event, Warned)]
    assert any("model-rtx.engine was built from an earlier model.onnx" in text for text in warnings)
    write_sidecar(describe_artifact(engine, kind="engine", precision="fp32", facts={"onnx_sha256": graph.sha256}))
    assert not is_outdated(engine, graph.sha256)


def test_a_graph_without_the_precision_asked_for_is_refused(
    net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def keep_every_layer(source: Path, path: Path, precision: str, **_: object) -> Artifact:
        return write_onnx(onnx.load(source), path, precision)

    monkeypatch.setattr(exporter, "convert_file", keep_every_layer)
    with pytest.raises(ParityError, match=r"model-fp16\.onnx is not fp16: found 0 of 5 convolutions"):
        export(net, images, tmp_path, precisions=("fp16",), batch=(1, 2, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["model-fp16.onnx.rejected"]


@pytest.mark.parametrize(
    ("batch", "parity_sizes"),
    [((1, 8, 32), [1, 2, 8, 32]), ((4, 8, 32), [4, 8, 32]), ((2, 2, 2), [2]), ((1, 1, 1), [1])],
)
def test_artifacts_are_compared_at_1_and_2_and_at_all_three_sizes(batch: tuple[int, ...], parity_sizes: list[int]):
    assert BatchRange.of(batch).parity_sizes == parity_sizes


@pytest.mark.parametrize("size", [1, 4])
def test_every_precision_is_exported_with_a_fixed_batch(size: int, net: SmallNet, images: Tensor, tmp_path: Path):
    assert len(images) % 4  # the last batch of four is not full
    written = export(net, images, tmp_path, precisions=("fp16", "bf16", "int8"), batch=(size, size, size))
    assert [artifact.facts["input"][0] for artifact in written] == [size] * 3
    assert [artifact.facts["parity"]["real_images"] for artifact in written] == [len(images)] * 3


def test_a_larger_loss_allows_as_many_other_answers():
    def agreement(precision: str, max_drop: float | None) -> float:
        return ExportSettings(max_drop=max_drop).limits(precision).top1_agreement

    assert [agreement("fp16", drop) for drop in (None, 0.001, 0.02)] == [0.995, 0.995, 0.98]
    assert agreement("int8", 0.1) == pytest.approx(0.9)
    assert ExportSettings(max_drop=0.1).limits("fp32").rel_error == 1e-4


def test_a_graph_that_fails_parity_never_becomes_an_engine(
    net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def disagree(*_: object, **__: object) -> None:
        raise ParityError("model.onnx differs")

    monkeypatch.setattr("passdeploy.export.settings.load_trt", lambda flavour: None)
    monkeypatch.setattr(exporter, "require_parity", disagree)
    with pytest.raises(ParityError):
        export(net, images, tmp_path, kinds=("onnx", "trt"))
    assert not list(tmp_path.glob("*.engine"))


def test_a_missing_tensorrt_is_found_before_anything_is_written(
    net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def missing(flavour: str) -> None:
        raise MissingError("no TensorRT")

    monkeypatch.setattr("passdeploy.export.settings.load_trt", missing)
    with pytest.raises(MissingError):
        export(net, images, tmp_path / "export", kinds=("onnx", "trt"))
    assert not (tmp_path / "export").exists()


def test_without_onnxruntime_the_user_hears_that_nothing_was_compared(
    net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    events: list[Event] = []
    monkeypatch.setattr(exporter, "find_spec", lambda name: None)
    settings = ExportSettings(precisions=("fp16",))
    samples = samples_of(images)
    (artifact,) = export_artifacts(net, samples, tmp_path, settings, prefix="dense", listener=events.append)
    assert artifact.path.name == "dense-fp16.onnx"
    assert "parity" not in artifact.facts
    assert any(isinstance(event, Warned) and "not compared" in event.text for event in events)


def test_without_real_images_noise_is_compared_and_int8_is_refused(net: SmallNet, tmp_path: Path):
    events: list[Event] = []
    no_samples = Samples.empty((3, 16, 16), MEAN, STD)
    (artifact,) = export_artifacts(net, no_samples, tmp_path, ExportSettings(batch=(1, 2, 4)), listener=events.append)
    parity = artifact.facts["parity"]
    assert (parity["real_images"], parity["top1"], parity["max_rel_error_real"]) == (0, None, None)
    assert parity["max_rel_error"] < 1e-4
    assert any(isinstance(event, Warned) and "--images" in event.text for event in events)
    with pytest.raises(UsageError, match="takes its ranges from real images"):
        list(export_artifacts(net, no_samples, tmp_path, ExportSettings(precisions=("int8",))))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"kinds": ("coreml",)}, UsageError, "choose from onnx, trt, torch-trt"),
        ({"precisions": ("fp12",)}, UsageError, "choose from fp32, fp16, bf16, int8, fp8"),
        ({"precisions": ("bf16",), "opset": 20}, UsageError, "they came with opset 22"),
        ({"precisions": ("int8",), "opset": 21}, UsageError, "20 is the newest that works"),
        ({"opset": 17}, UsageError, "choose 18 to 23"),
        ({"precisions": ("fp8",)}, MissingExtra, r"passdeploy\[quant\]"),
        (
            {"kinds": ("onnx", "trt"), "flavour": "rtx", "engine": EngineOptions(refittable=True)},
            UsageError,
            "without --refittable",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    net: SmallNet,
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, object],
    error: type[Exception],
    words: str,
):
    monkeypatch.setattr("passdeploy.export.settings.load_trt", lambda flavour: None)
    if find_spec("modelopt") is not None and "fp8" in settings.get("precisions", ()):
        pytest.skip("ModelOpt is installed")
    with pytest.raises(error, match=words) as caught:
        export(net, images, tmp_path / "export", **settings)
    assert str(caught.value).count("\n") < 3
    assert not (tmp_path / "export").exists()


def test_the_order_of_precisions_does_not_matter(net: SmallNet, images: Tensor, tmp_path: Path):
    artifacts = export(net, images, tmp_path, precisions=("fp16", "fp32"))
    assert [artifact.path.name for artifact in artifacts] == ["model-fp16.onnx", "model.onnx"]
    assert all(artifact.path.is_file() for artifact in artifacts)
