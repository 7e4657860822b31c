"""Checks of an ONNX graph, before any build, for what costs speed or what TensorRT does not accept.

A finding is not an error, since the graph may be meant for another runtime; `blocks_tensorrt` marks those
that TensorRT refuses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from passdeploy.errors import CorruptArtifact, clipped, enumerated, first_line
from passdeploy.export.casting import find_opset, types_of

# ONNX operators that TensorRT's parser has no importer for, from `OnnxParser.supports_operator` of TensorRT for RTX 1.7
# (opset 26) for each operator; a test compares the list with the parser where that is installed.
UNSUPPORTED_BY_TENSORRT = frozenset(
    [
        "AffineGrid",
        "Bernoulli",
        "BitCast",
        "BitShift",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "CenterCropPad",
        "Col2Im",
        "Compress",
        "ConcatFromSequence",
        "ConvInteger",
        "CumProd",
        "DFT",
        "DeformConv",
        "Det",
        "DynamicQuantizeLinear",
        "ImageDecoder",
        "MatMulInteger",
        "MaxRoiPool",
        "MaxUnpool",
        "MelWeightMatrix",
        "Multinomial",
        "NegativeLogLikelihoodLoss",
        "Optional",
        "OptionalGetElement",
        "OptionalHasElement",
        "QLinearConv",
        "QLinearMatMul",
        "RegexFullMatch",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceLength",
        "SequenceMap",
        "SoftmaxCrossEntropyLoss",
        "SplitToSequence",
        "StringConcat",
        "StringNormalizer",
        "StringSplit",
        "SwiGLU",
        "TfIdfVectorizer",
        "Unique",
    ]
)
_TRAINING = ("BatchNormalization", "Dropout")  # the exporter folds or removes them where it can
_CHANNEL_MULTIPLE = {"fp16": 8, "bf16": 8, "int8": 32, "fp8": 32}  # channel counts that tensor cores take unpadded
_NAMES: Mapping[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "uint8",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.DOUBLE: "fp64",
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
}


@dataclass(frozen=True)
class Finding:
    """One finding of the linter about a graph."""

    kind: str  # "batch_norm", "channels", "operator", "zero_point", "dynamic", "double"
    text: str
    blocks_tensorrt: bool


@dataclass(frozen=True)
class Lint:
    """Counts of a graph's nodes, weights and precisions, and the findings about it."""

    opset: int | None
    nodes: int
    weights: Mapping[str, int]  # element type -> number of weight tensors
    convolutions: Mapping[str, int]  # precision -> number of convolutions and matrix products that compute in it
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values for an artifact's facts."""
        return {
            "opset": self.opset,
            "nodes": self.nodes,
            "weights": dict(self.weights),
            "convolutions": dict(self.convolutions),
            "findings": [vars(finding) for finding in self.findings],
        }


def lint_file(path: Path, precision: str) -> Lint:
    """Lint an ONNX file of any origin; the weights that it keeps in other files are not read.

    Raises:
        CorruptArtifact: it cannot be parsed, or its graph is not whole.
    """
    try:
        return lint(onnx.load(path, load_external_data=False), precision)
    except Exception as error:  # a graph may lack anything that the format lets it lack
        raise CorruptArtifact(f"{path} is no whole ONNX file: {clipped(first_line(error), 200)}") from error


def lint(model: ModelProto, precision: str) -> Lint:
    """Count the nodes and types of a graph that is meant to compute in `precision`, and list the findings."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    types = types_of(model)
    computing = [node for node in graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    checks = [
        _find_training_nodes(graph.node),
        _find_unaligned_channels(computing, constants, producers, precision),
        _find_unsupported_operators(graph.node),
        _find_zero_points(graph.node, constants),
        _find_open_dimensions(graph.input),
        _find_doubles(types),
    ]
    return Lint(
        opset=find_opset(model),
        nodes=len(graph.node),
        weights=_count_names(_NAMES.get(tensor.data_type, f"type {tensor.data_type}") for tensor in graph.initializer),
        convolutions=_count_names(_precision_of(node, types, producers) for node in computing),
        findings=tuple(finding for finding in checks if finding),
    )


def _find_training_nodes(nodes: Any) -> Finding | None:
    """Find batch norms and dropouts that the exporter did not fold or remove."""
    left = _count_names(node.op_type for node in nodes if node.op_type in _TRAINING)
    if not left:
        return None
    text = ", ".join(f"{count} {kind}" for kind, count in left.items())
    return Finding(
        "batch_norm", f"{text} left in the graph: not folded into a convolution, so it runs by itself", False
    )


def _find_unaligned_channels(
    nodes: list[NodeProto], constants: Mapping[str, TensorProto], producers: Mapping[str, NodeProto], precision: str
) -> Finding | None:
    """Find convolutions with output channels that tensor cores pad in this precision."""
    multiple = _CHANNEL_MULTIPLE.get(precision)
    if multiple is None:
        return None
    odd = []
    for node in nodes:
        weight = constants.get(_weight_name(node, producers))
        if node.op_type == "Conv" and weight is not None and weight.dims[0] % multiple:
            odd.append(f"{node.name} ({weight.dims[0]})")
    if not odd:
        return None
    text = (
        f"{len(odd)} convolutions put out channels that are no multiple of {multiple}, padded in {precision}: "
        f"{enumerated(odd)}"
    )
    return Finding("channels", text, False)


def _find_unsupported_operators(nodes: Any) -> Finding | None:
    """Find custom operators, and ONNX operators without an importer in TensorRT's parser."""
    own = {f"{node.domain}.{node.op_type}" for node in nodes if node.domain not in ("", "ai.onnx")}
    names = own | {node.op_type for node in nodes if not node.domain and node.op_type in UNSUPPORTED_BY_TENSORRT}
    return Finding("operator", f"TensorRT has no {', '.join(sorted(names))}", True) if names else None


def _find_zero_points(nodes: Any, constants: Mapping[str, TensorProto]) -> Finding | None:
    """Find Q/DQ nodes with a zero point other than zero, which TensorRT does not accept."""
    shifted = [
        node.name
        for node in nodes
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2
        if (zero := constants.get(node.input[2])) is not None and np.any(numpy_helper.to_array(zero).astype(np.float32))
    ]
    if not shifted:
        return None
    return Finding("zero_point", f"{len(shifted)} zero points are not zero (first at {shifted[0]!r})", True)


def _find_open_dimensions(inputs: Any) -> Finding | None:
    """Find an input with dynamic dimensions besides the batch."""
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        free = [axis for axis, dim in enumerate(dims) if axis and not dim.HasField("dim_value")]
        if free:
            return Finding("dynamic", f"input {value.name!r} has open dimensions {free} beside the batch", True)
    return None


def _find_doubles(types: Mapping[str, int]) -> Finding | None:
    """Find float64 values, a type that TensorRT does not have."""
    count = sum(kind == TensorProto.DOUBLE for kind in types.values())
    return Finding("double", f"{count} values are float64, which TensorRT does not have", True) if count else None


def _precision_of(node: NodeProto, types: Mapping[str, int], producers: Mapping[str, NodeProto]) -> str:
    """Return the precision a convolution computes in: the type of its input, or its input's quantised type."""
    producer = producers.get(node.input[0])
    if producer is not None and producer.op_type == "DequantizeLinear":
        weight = producers.get(node.input[1])
        if weight is not None and weight.op_type == "DequantizeLinear":
            return _NAMES.get(types.get(producer.input[0], 0), "unknown")
    return _NAMES.get(types.get(node.input[0], 0), "unknown")


def _weight_name(node: NodeProto, producers: Mapping[str, NodeProto]) -> str:
    """Return the name of the constant behind a node's second input, skipping a Q/DQ pair in between."""
    name = str(node.input[1])
    while (producer := producers.get(name)) and producer.op_type in ("QuantizeLinear", "DequantizeLinear"):
        name = str(producer.input[0])
    return name


def _count_names(names: Any) -> dict[str, int]:
    """Count how often each name occurs, sorted by name."""
    return dict(sorted(Counter(names).items()))
