"""Additions of a zero, which skipped blocks leave behind, are no part of an exported graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torchvision.models import VisionTransformer

from passdeploy import Plan, export_onnx, slim
from passdeploy.export.ort_session import open_session
from passdeploy.export.zero_additions import remove_zero_additions_
from passdeploy.grouping.find import map_channels


def graph_adding(value: float, shape: list[int]) -> onnx.ModelProto:
    """Relu(x + ConstantOfShape(shape)), twice added, of x (batch, 4)."""
    batch = ["batch", 4]
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zero"], value=helper.make_tensor("", 1, [1], [value])),
        helper.make_node("Add", ["x", "zero"], ["first"]),
        helper.make_node("Add", ["zero", "first"], ["second"]),
        helper.make_node("Relu", ["second"], ["y"]),
    ]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "added",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, batch)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, batch)],
            [numpy_helper.from_array(np.array(shape, np.int64), "shape")],
            value_info=[helper.make_tensor_value_info("first", TensorProto.FLOAT, batch)],
        )
    )


def kinds(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def test_additions_of_a_zero_go_with_the_zero():
    proto = graph_adding(0.0, [1, 1])
    assert remove_zero_additions_(proto) == 2
    assert kinds(proto) == ["Relu"]
    assert proto.graph.node[0].input == ["x"]
    assert not proto.graph.initializer
    onnx.checker.check_model(proto, full_check=True)


def test_what_is_no_zero_or_changes_the_shape_stays():
    for proto in (graph_adding(1.0, [1, 1]), graph_adding(0.0, [3, 1]), graph_adding(0.0, [1, 1, 1])):
        assert remove_zero_additions_(proto) == 0
        assert kinds(proto) == ["ConstantOfShape", "Add", "Add", "Relu"]


def test_nothing_of_a_skipped_branch_is_exported(tmp_path: Path):
    torch.manual_seed(0)
    net = VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=5
    ).eval()
    images = torch.randn(2, 3, 16, 16)
    channels = map_channels(net, images, with_blocks=True)
    skipped = [block.name for block in channels.blocks if block.name.endswith("mlp")]
    smaller = slim(net, channels.groups, Plan({}, tuple(skipped)), channels.blocks)
    path = tmp_path / "model.onnx"
    export_onnx(smaller, images, path)
    added = [node for node in onnx.load(path).graph.node if node.op_type == "ConstantOfShape"]
    assert len(added) <= 1  # of the class token
    found = open_session(path, threads=1).run(None, {"images": images.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, smaller(images).numpy(), atol=1e-5)
