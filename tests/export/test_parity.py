"""Tests of the parity check: errors, agreement, accuracy, and the limits of each precision."""

from __future__ import annotations

import shutil
from math import inf, nan
from pathlib import Path

import pytest
import torch
from torch import Tensor

from passdeploy.errors import CorruptArtifact, ParityError, RunError
from passdeploy.export import Artifact, check_parity
from passdeploy.export.parity import Parity, errors_between, gate_problem, require_parity
from passdeploy.export.precision import LIMITS, Limits
from passdeploy.export.reference import ONNX_FILE, compute_answers, compute_reference, reference_from_answers

from .nets import SmallNet, node, small_net, write_graph

pytest.importorskip("onnxruntime", reason="parity runs in ONNX Runtime (extra cpu)")


def test_an_export_agrees_with_its_model_at_every_batch_size(exported: Artifact, net: SmallNet, images: Tensor):
    parity = check_parity(exported.path, net, images, batch_sizes=(1, 2, 4))
    assert parity.max_rel_error < 1e-5
    assert parity.top1_agreement == 1.0
    assert parity.images == (1 + 1) + (2 + 2) + (8 + 4)  # real + noise; five real images take two batches of four
    assert exported.path.exists()


def test_the_model_is_left_in_training_mode(exported: Artifact, images: Tensor):
    model = small_net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_parity(exported.path, model, images, batch_sizes=(2,))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_that_differs_is_set_aside(exported: Artifact, images: Tensor, tmp_path: Path):
    path = shutil.copy(exported.path, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"differs from the PyTorch model by .* \(limit 1e-04\)"):
        check_parity(path, small_net(seed=7), images)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx.rejected"]


def test_a_batch_frozen_into_the_graph_is_found(images: Tensor, tmp_path: Path):
    frozen = write_graph(tmp_path / "model.onnx", [node("Relu", "images")], shape=(2, 3, 16, 16))
    with pytest.raises(ParityError, match="does not run at batch 1"):
        check_parity(frozen, torch.nn.ReLU(), images, batch_sizes=(2, 1))
    assert not frozen.exists()


def test_another_output_shape_is_found(images: Tensor, tmp_path: Path):
    graph = write_graph(tmp_path / "model.onnx", [node("Relu", "images")], shape=("batch", 3, 16, 16))
    with pytest.raises(ParityError, match=r"returns shape \(1, 3, 16, 16\) where the model returns \(1, 768\)"):
        check_parity(graph, torch.nn.Flatten(), images)


def test_a_file_that_is_not_onnx_is_corrupt(net: SmallNet, images: Tensor, tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"something else")
    with pytest.raises(CorruptArtifact, match="cannot open"):
        check_parity(path, net, images)


def test_a_missing_file_names_the_command(net: SmallNet, images: Tensor, tmp_path: Path):
    with pytest.raises(RunError, match="passdeploy export --onnx"):
        check_parity(tmp_path / "model.onnx", net, images)


def test_the_error_is_relative_to_the_range_of_the_outputs():
    absolute, relative = errors_between(torch.tensor([0.0, 10.0]), torch.tensor([0.5, 10.0]))
    assert (absolute, relative) == (0.5, 0.05)


@pytest.mark.parametrize("broken", [nan, inf])
def test_a_value_that_is_not_finite_never_passes(broken: float):
    assert errors_between(torch.tensor([broken]), torch.tensor([broken])) == (inf, inf)


def parity(**changed: object) -> Parity:
    perfect = {
        "max_abs_error": 0.0,
        "max_rel_error": 0.0,
        "max_rel_error_real": 0.0,
        "top1_agreement": 1.0,
        "top1": 0.9,
        "reference_top1": 0.9,
        "images": 1100,
        "real_images": 1000,
        "batch_sizes": (1, 2),
    }
    return Parity(**{**perfect, **changed})


@pytest.mark.parametrize(
    ("changed", "precision", "problem"),
    [
        ({}, "fp16", None),
        ({"max_rel_error": 0.3}, "fp16", "differs from the PyTorch model by 3.0e-01"),
        ({"max_rel_error": nan}, "fp16", "differs"),
        ({"max_rel_error": 0.9}, "int8", None),  # on noise, which is clipped to the calibrated range
        ({"max_rel_error": inf}, "int8", "differs"),
        ({"max_rel_error_real": 0.9}, "int8", "differs"),
        ({"top1_agreement": 0.9941}, "fp16", None),  # one image fewer than 99.5 %
        ({"top1_agreement": 0.99}, "fp16", "answer on only 99.00 % of 1000 images"),
        ({"top1_agreement": 0.97}, "int8", "answer on only"),
        ({"top1": 0.895}, "fp16", None),
        ({"top1": 0.894}, "fp16", "loses 0.60 points of top-1, 90.00 % to 89.40 %"),
        ({"top1": None, "reference_top1": None}, "fp16", None),
        ({"real_images": 0, "top1_agreement": 0.2}, "fp16", None),
    ],
)
def test_the_gate_of_a_precision(changed: dict[str, object], precision: str, problem: str | None):
    actual = gate_problem(parity(**changed), LIMITS[precision])
    assert actual is None if problem is None else problem in str(actual)


def test_agreement_and_accuracy_count_every_real_image_once(exported: Artifact, net: SmallNet, images: Tensor):
    labels = net(images).argmax(1)
    labels[0] = (labels[0] + 1) % 5
    result = check_parity(exported.path, net, images, labels, batch_sizes=(1, 2, 4))  # the second four wrap around
    assert (result.real_images, result.top1, result.reference_top1, result.top1_drop) == (5, 0.8, 0.8, 0.0)


def test_the_answers_of_an_onnx_file_are_not_taken_for_those_of_the_model(net: SmallNet, images: Tensor):
    answers = compute_answers(net, images, batch=4)
    torch.testing.assert_close(answers, net(images))
    reference = reference_from_answers(images, answers, batch_sizes=(1, 4), answered_by=ONNX_FILE)
    assert reference.answered_by == ONNX_FILE
    differing = parity(max_rel_error=0.3, compared_with=ONNX_FILE)
    assert str(gate_problem(differing, LIMITS["fp16"])).startswith("differs from its ONNX file by 3.0e-01")


def test_a_reference_has_the_batches_of_one_size(net: SmallNet, images: Tensor):
    reference = compute_reference(net, images, batch_sizes=(1, 2, 4)).at(2)
    assert [len(batch.images) for batch in reference.batches] == [2, 2]  # real images and noise
    assert (reference.batch_sizes, reference.image_shape) == ((2,), (3, 16, 16))


def test_a_loss_of_accuracy_sets_the_file_aside(exported: Artifact, net: SmallNet, images: Tensor, tmp_path: Path):
    path = Path(shutil.copy(exported.path, tmp_path / "model.onnx"))
    many = images.repeat(20, 1, 1, 1)
    reference = compute_reference(net, many, net(many).argmax(1), batch_sizes=(4,))
    other = compute_reference(small_net(seed=7), many, net(many).argmax(1), batch_sizes=(4,))
    assert other.top1 is not None
    assert other.top1 < reference.top1
    with pytest.raises(ParityError, match="the PyTorch model's answer on only"):
        require_parity(path, other, "fp32", Limits(rel_error=1e9, top1_agreement=0.9, top1_drop=0.01))
    assert not path.exists()
