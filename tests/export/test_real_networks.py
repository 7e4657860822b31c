"""Tests that build real engines of two slim networks, and of a dense one, in three precisions."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import passdeploy as pd
from passdeploy.export import ExportSettings, Samples, export_artifacts
from passdeploy.models.build import build_model

SIZE = 32


def slimmed(model: nn.Module) -> nn.Module:
    """Slim a model to the first half of each group that can be pruned."""
    groups = pd.find_groups(model, torch.zeros(1, 3, SIZE, SIZE))
    kept = {group.name: tuple(range(max(1, group.width // 2))) for group in groups if group.is_prunable}
    return pd.slim(model, groups, pd.Plan(kept))


@pytest.mark.slow
@pytest.mark.rtx
@pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="extra rtx is not installed")
@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("torchvision/resnet18", "slim"),
        ("torchvision/mobilenet_v3_small", "slim"),
    ],
)
def test_engines_are_built_in_three_precisions(name: str, network: str, tmp_path: Path):
    model = build_model(name, num_classes=10)
    if network == "slim":
        model = slimmed(model)
    images = torch.randn(32, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    model.train()
    with torch.no_grad():
        for _ in range(10):  # update the batch-norm statistics; with the initial ones, activations vanish
            model(images)
    model.eval()
    # Untrained networks give all classes nearly the same score, so only errors are compared, not answers.
    samples = Samples(images[:0], images, (3, SIZE, SIZE), (0.5,) * 3, (0.25,) * 3)
    settings = ExportSettings(kinds=("onnx", "trt"), flavour="rtx", precisions=("fp32", "fp16", "int8"))
    written = list(export_artifacts(model, samples, tmp_path, settings))
    assert [artifact.precision for artifact in written] == ["fp32", "fp32", "fp16", "fp16", "int8", "int8"]
    for engine in written[1::2]:
        counts = engine.facts["census"]["convolutions"]
        assert set(counts) == {engine.precision}, counts
        assert engine.facts["batch"] == [1, 8, 32]
        assert engine.size_bytes > 100_000
    fp32, fp16, int8 = (artifact.size_bytes for artifact in written[::2])
    assert int8 < fp16 < fp32
