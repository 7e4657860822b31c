"""Tests of the ONNX linter: one finding in each faulty graph, none in an exported one."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from passdeploy.export import Artifact
from passdeploy.export.lint import UNSUPPORTED_BY_TENSORRT, lint

from .nets import node, write_graph

ONES = np.ones(3, np.float32)
BAD = {
    "batch_norm": (
        [node("BatchNormalization", "images", "one", "one", "one", "one")],
        {"one": ONES},
        "1 BatchNormalization left",
        False,
    ),
    "channels": (
        [node("Conv", "images", "weight")],
        {"weight": np.ones((5, 3, 1, 1), np.float32)},
        r"no multiple of 8, padded in fp16: Conv-logits \(5\)",
        False,
    ),
    "operator": ([node("Det", "images")], {}, "TensorRT has no Det", True),
    "own operator": ([node("Mystery", "images", domain="my.ops")], {}, "TensorRT has no my.ops.Mystery", True),
    "zero_point": (
        [
            node("QuantizeLinear", "images", "scale", "zero", output="quantised"),
            node("DequantizeLinear", "quantised", "scale", "zero"),
        ],
        {"scale": np.float32(0.1), "zero": np.int8(3)},
        "2 zero points are not zero",
        True,
    ),
    "double": (
        [node("Cast", "images", output="wide", to=11), node("Cast", "wide", to=1)],
        {},
        "float64",
        True,
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_faulty_graph_has_a_finding(kind: str, tmp_path: Path):
    nodes, weights, words, blocks = BAD[kind]
    path = write_graph(tmp_path / "bad.onnx", nodes, weights, domains=["my.ops"])
    (finding,) = lint(onnx.load(path), "fp16").findings
    assert finding.blocks_tensorrt == blocks
    assert re.search(words, finding.text), finding.text
    assert finding.kind == kind.removeprefix("own ")


def test_an_open_image_size_is_found(tmp_path: Path):
    graph = onnx.load(write_graph(tmp_path / "open.onnx", [node("Relu", "images")], shape=("batch", 3, "h", "w")))
    (finding,) = lint(graph, "fp32").findings
    assert "open dimensions [2, 3]" in finding.text


def test_our_own_graph_is_clean_and_counted(exported: Artifact):
    report = lint(onnx.load(exported.path), "fp32")
    assert report.findings == ()
    assert report.opset == 20
    assert report.convolutions == {"fp32": 5}  # four convolutions and the classifier
    assert report.to_json()["weights"]["fp32"] >= 8


@pytest.mark.rtx
@pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="extra rtx is not installed")
def test_the_list_of_unsupported_operators_is_the_parsers_own():
    import tensorrt_rtx_bindings as trt

    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser: Any = trt.OnnxParser(network, logger)
    known = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain and not schema.deprecated}
    refused = {name for name in known if not parser.supports_operator(name)}
    assert refused == UNSUPPORTED_BY_TENSORRT & known
