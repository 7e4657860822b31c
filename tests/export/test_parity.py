from __future__ import annotations

import shutil
from math import inf, nan
from pathlib import Path

import pytest
import torch
from torch import Tensor

from passdeploy.errors import CorruptArtifact, ParityError, RunError
from passdeploy.export import Artifact, check_parity
from passdeploy.export.parity import errors_between

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
