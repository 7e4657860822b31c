"""ONNX layers: match the kernels of ONNX Runtime and TensorRT to the layers of an ONNX graph and their channel widths.

ONNX Runtime fuses activations and additions into convolutions and names the fused kernel after the convolution or after
the last value that was fused; which one depends on the kernel, which is chosen by the number of channels. A layer here
is a node with a weight, under any of these names; the dimensions of its weight are the widths that it depends on.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from passdeploy.channels.costs import Factor
from passdeploy.profiling.kernel_times import NodeTime

if TYPE_CHECKING:
    from onnx import GraphProto

_WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose")
_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Tanh", "HardSwish")
_BETWEEN_NAMES = re.compile(r"[\s+(),\[\]{}]+")  # of nodes, in the name of an engine's layer
_BLOCKED = "_nchwc"  # suffix of the output's name that a kernel of the blocked memory layout is named by


@dataclass(frozen=True)
class OnnxLayer:
    """A node with a weight."""

    name: str
    sizes: tuple[Factor, ...]  # the sizes of its weight that depend on channel widths


def find_layers(graph: GraphProto, dims: Mapping[str, Sequence[Factor]]) -> dict[str, OnnxLayer]:
    """Map every name that a kernel may have to its layer.

    Args:
        graph: as it was exported.
        dims: name of a weight -> the size of each of its dimensions; other weights are ignored.
    """
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for value in node.input:
            readers[value].append(node)
    names: dict[str, OnnxLayer] = {}
    for node in graph.node:
        if node.op_type in _WEIGHTED and len(node.input) > 1 and node.input[1] in dims:
            sizes = tuple(dict.fromkeys(factor for factor in dims[node.input[1]] if factor.spans))
            layer = OnnxLayer(node.name, sizes)
            for name in (node.name, *_fused_names(node, readers)):
                names[name] = layer  # two layers that end in one addition: the later one, which is the fused one
    return names


def _fused_names(node: Any, readers: Mapping[str, Sequence[Any]]) -> list[str]:
    """List the names that a node may have once the nodes that follow it are fused into it."""
    names, value = [], node.output[0]
    for kinds in (_ACTIVATIONS, ("Add",), _ACTIVATIONS):
        names.append(value + _BLOCKED)
        follower = next((reader for reader in readers[value] if reader.op_type in kinds), None)
        if follower is None and kinds is _ACTIVATIONS:
            continue
        if follower is None or (kinds == ("Add",) and value != node.output[0]):
            break  # an activation before an addition is not fused with it
        if kinds is _ACTIVATIONS:
            names.append(follower.name)
        value = follower.output[0]
    return [*names, value + _BLOCKED]


def merge_by_layer(nodes: Sequence[NodeTime], layers: Mapping[str, OnnxLayer]) -> tuple[NodeTime, ...]:
    """Rename kernels after their layers and sum those of one layer; kernels of no layer stay as they are."""
    merged: dict[str, NodeTime] = {}
    for node in nodes:
        layer = layers.get(node.name)
        if layer is None:
            merged[node.name] = node
        elif layer.name not in merged:
            merged[layer.name] = replace(node, name=layer.name, sizes=layer.sizes)
        else:
            known = merged[layer.name]
            merged[layer.name] = replace(known, ms=known.ms + node.ms)
    return tuple(merged.values())


def nodes_named_in(engine_layer: str) -> list[str]:
    """Split the name of a layer of a TensorRT engine, which is fused from several nodes, into words: names of nodes.

    A change of format has none: it is named after the layer that follows. Of a long block only the ends are named, in
    one word.

    >>> nodes_named_in("conv_1 + relu_1"), nodes_named_in("{ForeignNode[a...b]}"), nodes_named_in("Reformatting conv_1")
    (['conv_1', 'relu_1'], ['ForeignNode', 'a...b'], [])
    """
    if engine_layer.lower().startswith("reformat"):
        return []
    return [word for word in _BETWEEN_NAMES.split(engine_layer) if word]
