"""Tests of the ONNX export: batch dimension, opset, metadata, same bytes for the same model, refused models."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from passdeploy.errors import ExportError, UsageError
from passdeploy.export import Artifact, export_onnx
from passdeploy.export import onnx_graph as module_under_test
from passdeploy.export.ort_session import open_session
from passdeploy.runtime.files import sha256_of

from .nets import SmallNet, small_net


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_the_batch_is_open_and_the_ends_are_named(exported: Artifact):
    graph = onnx.load(exported.path).graph
    assert [(value.name, dims(value)) for value in (*graph.input, *graph.output)] == [
        ("images", ["batch", 3, 16, 16]),
        ("logits", ["batch", 5]),
    ]


def test_the_artifact_describes_the_file_that_lies_there(exported: Artifact):
    assert exported.sha256 == sha256_of(exported.path)
    assert exported.size_bytes == exported.path.stat().st_size
    assert (exported.kind, exported.precision, exported.facts["opset"]) == ("onnx", "fp32", 20)


def test_batch_norms_are_folded_and_dropout_is_gone(exported: Artifact):
    kinds = [node.op_type for node in onnx.load(exported.path).graph.node]
    assert kinds.count("Conv") == 4
    assert not {"BatchNormalization", "Dropout"} & set(kinds)


def test_metadata_is_text_or_json(exported: Artifact):
    metadata = {entry.key: entry.value for entry in onnx.load(exported.path).metadata_props}
    assert metadata["run"] == "tiny-0001"
    assert json.loads(metadata["classes"]) == ["a", "b"]
    assert json.loads(metadata["batch"]) == [1, 8, 32]


def test_the_file_does_not_tell_where_it_was_made(exported: Artifact):
    content = exported.path.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert str(Path(__file__).parent).encode() not in content


def test_the_same_model_gives_the_same_bytes_from_training_mode_too(exported: Artifact, images: Tensor, tmp_path: Path):
    training = small_net().train()
    training.block.eval()  # a mixture, as in fine-tuning with frozen norms
    before = {name: value.clone() for name, value in training.state_dict().items()}
    flags = [module.training for module in training.modules()]

    again = export_onnx(training, images, tmp_path / "b.onnx", metadata={"classes": ["a", "b"], "run": "tiny-0001"})

    assert again.sha256 == exported.sha256
    assert [module.training for module in training.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in training.state_dict().items())
    assert all(parameter.requires_grad for parameter in training.parameters())


def test_exporting_prints_nothing(images: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    export_onnx(small_net(), images, tmp_path / "quiet.onnx")
    assert capfd.readouterr() == ("", "")


def test_a_range_of_one_size_fixes_the_batch(net: SmallNet, images: Tensor, tmp_path: Path):
    artifact = export_onnx(net, images, tmp_path / "fixed.onnx", batch=(4, 4, 4), opset=18)
    proto = onnx.load(artifact.path)
    assert dims(proto.graph.input[0]) == [4, 3, 16, 16]
    assert [entry.version for entry in proto.opset_import if not entry.domain] == [18]


@pytest.mark.parametrize("batch", [(8, 1, 32), (0, 1, 2), (1, 8)])
def test_a_batch_that_is_no_range_is_refused(net: SmallNet, images: Tensor, tmp_path: Path, batch: tuple[int, ...]):
    with pytest.raises(UsageError, match="MIN <= OPT <= MAX"):
        export_onnx(net, images, tmp_path / "never.onnx", batch=batch)


def test_an_opset_that_would_be_changed_silently_is_refused(net: SmallNet, images: Tensor, tmp_path: Path):
    with pytest.raises(UsageError, match="opset 17"):
        export_onnx(net, images, tmp_path / "never.onnx", opset=17)


def test_an_opset_that_was_changed_silently_is_an_error(exported: Artifact, net: SmallNet):
    proto = onnx.load(exported.path)
    sizes = module_under_test.BatchRange(1, 8, 32)
    with pytest.raises(ExportError, match="asked for ONNX opset 21, torch's exporter produced 20"):
        module_under_test._require_requested(proto, 21, sizes, net)


class FixesTheBatch(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).mean(0, keepdim=True)


class BranchesOnData(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) if images.sum() > 0 else -images.flatten(1)


class TwoOutputs(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.flatten(1), images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (FixesTheBatch(), "fixes the batch of 'logits' at 1"),
        (BranchesOnData(), "cannot be exported to ONNX"),
        (TwoOutputs(), "1 inputs and 2 outputs"),
    ],
)
def test_a_model_that_cannot_be_exported_is_three_lines_and_no_file(
    model: nn.Module, words: str, images: Tensor, tmp_path: Path
):
    with pytest.raises(ExportError, match=words) as caught:
        export_onnx(model, images, tmp_path / "never.onnx")
    assert str(caught.value).count("\n") < 3
    assert list(tmp_path.iterdir()) == []


class AsksForTheBatch(nn.Module):
    """A network that calls `len`, which makes the batch size a constant in some ways of capturing a graph."""

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(len(images), -1)


def test_a_batch_that_is_asked_for_by_len_stays_open(images: Tensor, tmp_path: Path):
    artifact = export_onnx(AsksForTheBatch(), images, tmp_path / "model.onnx")
    (logits,) = open_session(artifact.path, threads=1).run(None, {"images": images.numpy()})
    assert torch.equal(torch.from_numpy(logits), images.flatten(1))


class LargestOfRegions(nn.Module):
    """Adaptive max pooling with indices, which torch's exporter does not support by itself."""

    def __init__(self, size: int | tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        values, indices = nn.functional.adaptive_max_pool2d(images, self.size, return_indices=True)
        return torch.cat([values.flatten(1), indices.flatten(1).float()], 1)


@pytest.mark.parametrize("size", [1, 2, (3, 4)])
def test_adaptive_max_pooling_is_exported_with_regions_that_overlap(size: int | tuple[int, int], tmp_path: Path):
    model, images = LargestOfRegions(size), torch.randn(5, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    artifact = export_onnx(model, images, tmp_path / "pool.onnx")
    (logits,) = open_session(artifact.path, threads=1).run(None, {"images": images.numpy()})
    assert torch.equal(torch.from_numpy(logits), model(images))
