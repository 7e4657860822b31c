"""Tests of quantisation for TensorRT, and of the layers that stay float32 for accuracy."""

from __future__ import annotations

import copy
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor, nn

from passdeploy.errors import ExportError, MissingExtra, ParityError, UsageError
from passdeploy.export import Artifact, BatchRange, export_onnx, quantise
from passdeploy.export.batches import cut_into_batches
from passdeploy.export.conversion import convert_file
from passdeploy.export.layer_ranking import convert_until_it_passes
from passdeploy.export.lint import lint
from passdeploy.export.parity import require_parity
from passdeploy.export.precision import LIMITS
from passdeploy.export.quantise import int8_conversion, modelopt_conversion, quantisable_nodes
from passdeploy.export.reference import compute_reference

from .nets import node, small_net, write_graph


@pytest.fixture(scope="module")
def quantised(exported: Artifact, images: Tensor) -> ModelProto:
    return int8_conversion(exported.path, images)(())


def test_scales_of_weights_are_per_channel_and_no_zero_point_is_other_than_zero(quantised: ModelProto):
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantised.graph.initializer}
    pairs = [one for one in quantised.graph.node if one.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    assert all(not constants[one.input[2]].any() for one in pairs)
    producers = {one.output[0]: one for one in pairs}
    convolutions = [one for one in quantised.graph.node if one.op_type == "Conv"]
    assert len(convolutions) == 4
    for one in convolutions:
        scale, weight = (constants[producers[one.input[1]].input[place]] for place in (1, 0))
        assert weight.dtype == np.int8
        assert scale.shape == weight.shape[:1]


def test_only_inputs_are_quantised_so_that_activations_fuse(quantised: ModelProto):
    consumers = {name: one for one in quantised.graph.node for name in one.input}
    for one in quantised.graph.node:
        if one.op_type == "Conv" and one.output[0] in consumers:
            following = consumers[one.output[0]].op_type
            assert following in ("Clip", "QuantizeLinear")  # the residual sum's input is quantised, since it has one
    assert quantised.graph.node[-1].output[0] == "logits" or "logits" in {
        name for one in quantised.graph.node if one.op_type == "Gemm" for name in one.output
    }


def test_a_kept_layer_is_not_quantised(exported: Artifact, images: Tensor):
    convert = int8_conversion(exported.path, images)
    first = quantisable_nodes(onnx.load(exported.path))[0]
    graph = convert([first]).graph
    weight = next(one for one in graph.node if one.name == first).input[1]
    assert next(t for t in graph.initializer if t.name == weight).data_type == TensorProto.FLOAT
    all_converted = convert(()).graph  # made from the same calibration
    assert weight not in {name for one in all_converted.node if one.name == first for name in one.input}


def test_without_images_there_is_nothing_to_calibrate_on(exported: Artifact, images: Tensor):
    with pytest.raises(UsageError, match="real images"):
        int8_conversion(exported.path, images[:0])


def test_a_fixed_batch_is_always_full():
    images = torch.arange(5)
    assert [batch.tolist() for batch in cut_into_batches(images, None, usual=4)] == [[0, 1, 2, 3], [4]]
    assert [batch.tolist() for batch in cut_into_batches(images, 3, usual=4)] == [[0, 1, 2], [3, 4, 0]]
    assert [batch.tolist() for batch in cut_into_batches(images, 7, usual=4)] == [[0, 1, 2, 3, 4, 0, 1]]


class Wide(nn.Module):
    """Three convolutions of 32 channels: ModelOpt leaves narrower ones as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *(layer for width in (3, 32, 32) for layer in (nn.Conv2d(width, 32, 3, padding=1), nn.ReLU()))
        )
        self.classifier = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.convolutions(images).mean((2, 3)))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("modelopt") is None, reason="ModelOpt is not installed (extra quant)")
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_modelopt_quantises_and_onnx_runtime_agrees(
    precision: str, images: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    torch.manual_seed(0)
    model = Wide().eval()
    source = export_onnx(model, images, tmp_path / "model.onnx", batch=(1, 2, 4))
    reference = compute_reference(model, images, batch_sizes=(1, 4))
    artifact = convert_file(
        source.path,
        tmp_path / "converted.onnx",
        precision,
        calibration=images,
        reference=reference,
        limits=LIMITS[precision],
        quantiser="modelopt",
    )
    assert artifact.facts["quantiser"] == "modelopt"
    assert artifact.facts["batch"] == [1, 2, 4]  # from the metadata, which ModelOpt leaves out
    assert lint(onnx.load(artifact.path), precision).convolutions[precision] >= 2
    assert require_parity(artifact.path, reference, precision, LIMITS[precision]).max_rel_error_real < 0.2
    assert capfd.readouterr().out == ""
    int8_conversion(source.path, images)(())  # still works, although ModelOpt patches ONNX Runtime's quantiser


def test_what_modelopt_writes_keeps_the_metadata_of_its_source(
    exported: Artifact, images: Tensor, monkeypatch: pytest.MonkeyPatch
):
    def quantize(*, onnx_path: str, output_path: str, **_: object) -> None:
        model = onnx.load(onnx_path)
        del model.metadata_props[:]  # as ModelOpt does, which builds a new model
        onnx.save(model, output_path)

    monkeypatch.setattr(quantise, "require", lambda *_, **__: SimpleNamespace(quantize=quantize))
    converted = quantise.modelopt_conversion(exported.path, images, "fp8")(())
    assert {one.key for one in converted.metadata_props} >= {"batch"}
    assert list(converted.metadata_props) == list(onnx.load(exported.path).metadata_props)


@pytest.mark.skipif(find_spec("modelopt") is not None, reason="ModelOpt is installed")
def test_fp8_without_modelopt_names_the_extra(exported: Artifact, images: Tensor):
    with pytest.raises(MissingExtra, match=r"passdeploy\[quant\]"):
        modelopt_conversion(exported.path, images, "fp8")


def stand_in_graph(kept: Collection[str]) -> ModelProto:
    """Make a stand-in for a graph, which holds only the names of its kept layers."""
    return SimpleNamespace(kept=frozenset(kept))  # type: ignore[return-value]


LAYERS = tuple("abcdefghij")
LARGE_ERRORS = {"c": 9.0, "g": 5.0, "a": 3.0}  # layer -> its error; 0.01 for the others


def total_error(model: ModelProto) -> float:
    return sum(LARGE_ERRORS.get(layer, 0.01) for layer in LAYERS if layer not in model.kept)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("allowed", "kept"), [(20, ""), (9, "c"), (4, "cg"), (1, "cga")])
def test_as_few_layers_as_pass_are_kept_the_worst_first(allowed: float, kept: str):
    def find_problem(model: ModelProto) -> str | None:
        return None if total_error(model) <= allowed else "too far"

    converted = convert_until_it_passes(stand_in_graph, LAYERS, find_problem, total_error)
    assert "".join(converted.kept) == kept
    assert converted.problem is None


def test_at_least_one_layer_is_converted():
    def find_problem(model: ModelProto) -> str | None:
        return None if len(model.kept) == len(LAYERS) else "too far"  # type: ignore[attr-defined]

    converted = convert_until_it_passes(stand_in_graph, LAYERS, find_problem, total_error)
    assert (converted.problem, converted.kept) == ("too far", ())


def test_a_network_without_anything_to_quantise_is_refused(tmp_path: Path, images: Tensor):
    source = write_graph(tmp_path / "model.onnx", [node("Relu", "images")], shape=("batch", 3, 16, 16))
    with pytest.raises(ExportError, match="no layer of the network can be int8"):
        convert_file(
            source, tmp_path / "model-int8.onnx", "int8", calibration=images, reference=None, limits=LIMITS["int8"]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_where_nothing_passes_the_problem_stays_and_nothing_is_kept():
    converted = convert_until_it_passes(stand_in_graph, LAYERS, lambda model: "too far", total_error)
    assert (converted.problem, converted.kept) == ("too far", ())
    assert converted.checked < len(LAYERS)


class Overflows(nn.Module):
    """A small network with one sum that fp16 cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, images: Tensor) -> Tensor:
        features = self.net.stem(images)
        large = features * 1e5
        return self.net.head(((features + self.net.block(features)) + large * 1e-5).mean((2, 3)))


@pytest.mark.parametrize("batch", [(1, 2, 4), (4, 4, 4)])
def test_a_layer_that_overflows_is_found_and_kept(batch: tuple[int, ...], images: Tensor, tmp_path: Path):
    model = Overflows().eval()
    source = export_onnx(model, images, tmp_path / "model.onnx", batch=batch)
    reference = compute_reference(model, images, batch_sizes=BatchRange.of(batch).parity_sizes)
    artifact = convert_file(
        source.path,
        tmp_path / "model-fp16.onnx",
        "fp16",
        calibration=images,
        reference=reference,
        limits=LIMITS["fp16"],
    )
    kept = artifact.facts["kept"]
    assert 1 <= len(kept) <= 3
    assert all("mul" in name.lower() for name in kept)
    parity = require_parity(artifact.path, reference, "fp16", LIMITS["fp16"])
    assert parity.max_rel_error < LIMITS["fp16"].rel_error

    unchecked = convert_file(
        source.path, tmp_path / "bad.onnx", "fp16", calibration=images, reference=None, limits=LIMITS["fp16"]
    )
    with pytest.raises(ParityError, match="differs from the PyTorch model by inf"):
        require_parity(unchecked.path, reference, "fp16", LIMITS["fp16"])
    assert [path.name for path in tmp_path.glob("*.rejected")] == ["bad.onnx.rejected"]


def test_conversion_does_not_change_model_and_source(exported: Artifact, images: Tensor, tmp_path: Path):
    before = exported.path.read_bytes()
    model = small_net()
    state = copy.deepcopy(model.state_dict())
    reference = compute_reference(model, images, batch_sizes=(2,))
    convert_file(
        exported.path, tmp_path / "a.onnx", "int8", calibration=images, reference=reference, limits=LIMITS["int8"]
    )
    assert exported.path.read_bytes() == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
