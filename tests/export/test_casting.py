"""Tests of casting to fp16 and bf16: the nodes that are cast, those that stay float32, and emulated rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor

from passdeploy.errors import ExportError
from passdeploy.export import Artifact
from passdeploy.export.casting import ELEMENT_TYPES, cast_graph, castable_nodes, emulate_rounding, types_of
from passdeploy.export.ort_session import open_session
from passdeploy.export.parity import open_rounding_emulation

from .nets import SmallNet, node, write_graph


def answers(session: object, images: Tensor | np.ndarray) -> np.ndarray:
    (logits,) = session.run(None, {"images": np.asarray(images)})  # type: ignore[attr-defined]
    return logits


def write_overflowing_graph(path: Path, weight: float = 300.0) -> ModelProto:
    """Write two 1x1 convolutions with values near 120,000 between them, which overflow fp16, and small ones after."""
    up, down = np.full((4, 4, 1, 1), weight, np.float32), np.full((4, 4, 1, 1), 1e-3, np.float32)
    nodes = [node("Conv", "images", "up", output="large"), node("Conv", "large", "down")]
    write_graph(path, nodes, {"up": up, "down": down}, shape=("batch", 4, 2, 2))
    return onnx.load(path)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_all_nodes_are_cast_and_inputs_and_outputs_stay_float(exported: Artifact, precision: str):
    source = onnx.load(exported.path)
    if precision == "bf16":
        source.opset_import[0].version = 22  # nothing in this graph changed in between
    cast = cast_graph(source, precision)
    onnx.checker.check_model(cast, full_check=True)
    types = types_of(cast)
    assert types["images"] == types["logits"] == TensorProto.FLOAT
    weights = [tensor.data_type for tensor in cast.graph.initializer if tensor.data_type != TensorProto.INT64]
    assert set(weights) == {ELEMENT_TYPES[precision]}
    assert sum(one.op_type == "Cast" for one in cast.graph.node) == 2


def test_a_kept_node_computes_in_float_between_casts(exported: Artifact, net: SmallNet, images: Tensor):
    source = onnx.load(exported.path)
    layer = next(one for one in source.graph.node if one.op_type == "Conv")
    cast = cast_graph(source, "fp16", keep=[layer.name])
    onnx.checker.check_model(cast, full_check=True)
    kept = next(one for one in cast.graph.node if one.name == layer.name)
    types = types_of(cast)
    assert {types[name] for name in (*kept.input, *kept.output)} == {TensorProto.FLOAT}
    rounded = answers(open_rounding_emulation(cast), images)
    np.testing.assert_allclose(rounded, net(images).detach(), rtol=0.01, atol=0.01)


def test_a_value_beyond_fp16_is_infinite_when_rounded_though_onnxruntime_hides_it(tmp_path: Path):
    cast = cast_graph(write_overflowing_graph(tmp_path / "large.onnx"), "fp16")
    images = np.full((1, 4, 2, 2), 100, np.float32)
    assert np.isfinite(answers(open_session(cast, threads=1), images)).all()  # 120,000 does not exist in fp16
    assert np.isinf(answers(open_rounding_emulation(cast), images)).all()


def test_bf16_rounds_to_eight_bits(tmp_path: Path):
    graph = write_graph(tmp_path / "graph.onnx", [node("Relu", "images")], shape=("batch", 3, 1, 1))
    session = open_rounding_emulation(cast_graph(onnx.load(graph), "bf16"))
    rounded = answers(session, np.array([[[[1.01]], [[3.3]], [[-1.0]]]], "f4"))
    assert rounded.ravel().tolist() == torch.tensor([1.01, 3.3, 0.0]).bfloat16().float().tolist()


def test_a_number_that_guards_a_division_is_not_rounded_to_zero(tmp_path: Path):
    nodes = [node("Max", "images", "eps", output="divisor"), node("Div", "images", "divisor")]
    graph = write_graph(tmp_path / "graph.onnx", nodes, {"eps": np.array(1e-12, np.float32)}, shape=("batch", 3, 1, 1))
    cast, images = cast_graph(onnx.load(graph), "fp16"), np.array([[[[0.0]], [[3.0]], [[2.0**-10]]]], "f4")
    for session in (open_rounding_emulation(cast), open_session(cast, threads=1, is_optimised=False)):
        assert answers(session, images).ravel().tolist() == [0.0, 1.0, 1.0]


def test_a_layer_whose_weights_do_not_fit_stays_float(tmp_path: Path):
    cast = cast_graph(write_overflowing_graph(tmp_path / "large.onnx", weight=1e5), "fp16")
    weights = {tensor.name: tensor.data_type for tensor in cast.graph.initializer}
    assert weights == {"up": TensorProto.FLOAT, "down": TensorProto.FLOAT16}


def test_an_input_that_must_be_float_is_float(tmp_path: Path):
    nodes = [node("Relu", "images", output="x"), node("Resize", "x", "", "scales")]
    scales = {"scales": np.array([1, 1, 2, 2], np.float32)}
    cast = cast_graph(onnx.load(write_graph(tmp_path / "resize.onnx", nodes, scales)), "fp16")
    resize = next(one for one in cast.graph.node if one.op_type == "Resize")
    types = types_of(cast)
    assert (types[resize.input[0]], types[resize.input[2]]) == (TensorProto.FLOAT16, TensorProto.FLOAT)


def test_constants_and_generators_inside_nodes_are_cast_too(tmp_path: Path):
    two = helper.make_tensor("two", TensorProto.FLOAT, [1], [2.0])
    nodes = [
        node("Constant", output="two", value=two),
        node("Mul", "images", "two", output="twice"),
        node("Shape", "images", output="shape"),
        node("ConstantOfShape", "shape", output="ones", value=helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])),
        node("Add", "twice", "ones"),
    ]
    cast = cast_graph(onnx.load(write_graph(tmp_path / "graph.onnx", nodes)), "fp16")
    onnx.checker.check_model(cast, full_check=True)
    onnx.checker.check_model(emulate_rounding(cast), full_check=True)
    assert castable_nodes(cast_graph(cast, "bf16"), "bf16") == ()
    images = np.ones((2, 3, 8, 8), np.float32)
    assert (answers(open_session(cast, threads=1), images) == 3).all()
    assert (answers(open_rounding_emulation(cast), images) == 3).all()


def test_control_flow_is_refused(tmp_path: Path):
    branch = helper.make_graph(
        [helper.make_node("Identity", ["images"], ["out"])], "branch", [], [helper.make_empty_tensor_value_info("out")]
    )
    nodes = [node("If", "yes", then_branch=branch, else_branch=branch)]
    graph = write_graph(tmp_path / "if.onnx", nodes, {"yes": np.array(True)})
    with pytest.raises(ExportError, match="control flow"):
        cast_graph(onnx.load(graph), "fp16")
