from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from passdeploy.export.onnx_graph import export_onnx
from passdeploy.export.quantise import quantise_uncalibrated
from passdeploy.profiling.layer_times import ELSEWHERE, trace_onnx_layers

pytest.importorskip("onnxruntime", reason="extra cpu is not installed")


def test_the_layers_of_an_int8_file_are_those_of_its_weights(tmp_path: Path):
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    ).eval()
    images = torch.randn(2, 3, 16, 16)
    file = tmp_path / "model.onnx"
    export_onnx(network, images[:1], file, batch=(2, 2, 2))
    file.write_bytes(quantise_uncalibrated(onnx.load(file), 4.0).SerializeToString())
    layers = trace_onnx_layers(file, images, threads=1, seconds=0.01)
    assert [(layer.name, layer.weight[0], layer.is_depthwise) for layer in layers[:-1]] == [
        ("0", 16, False),
        ("2", 16, True),
        ("6", 5, False),
    ]
    assert layers[-1].name == ELSEWHERE
    assert all(layer.ms > 0 for layer in layers)
