"""Which layer of an ONNX graph does a kernel of ONNX Runtime come from, and which widths does it follow?

ONNX Runtime fuses activations and additions into convolutions, names the result after the last value that was fused,
or after the convolution, and takes one kernel or the other by the number of channels. A layer here is a node with a
weight, under whichever of these names it runs; the weight says which widths it follows.
"""

from __future__ import annotations

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
_BLOCKED = "_nchwc"  # what a kernel of the blocked layout appends to the name of its output


@dataclass(frozen=True)
class OnnxLayer:
    """A node with a weight."""

    name: str
    sizes: tuple[Factor, ...]  # of its weight, those that follow widths


def find_layers(graph: GraphProto, dims: Mapping[str, Sequence[Factor]]) -> dict[str, OnnxLayer]:
    """Name of a kernel -> the layer it may be of.

    Args:
        graph: as it was exported.
        dims: of the weights that are known, the size of every dimension.
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
            for name in (node.name, *_names_after(node, readers)):
                names[name] = layer  # of two that end in one addition it is the later
    return names


def _names_after(node: Any, readers: Mapping[str, Sequence[Any]]) -> list[str]:
    """What a node may be called once what follows it was fused into it."""
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


def by_layer(nodes: Sequence[NodeTime], layers: Mapping[str, OnnxLayer]) -> tuple[NodeTime, ...]:
    """Kernels under the names of their layers; those of one layer as one, the others as they are."""
    found: dict[str, NodeTime] = {}
    for node in nodes:
        layer = layers.get(node.name)
        if layer is None:
            found[node.name] = node
        elif layer.name not in found:
            found[layer.name] = replace(node, name=layer.name, sizes=layer.sizes)
        else:
            whole = found[layer.name]
            found[layer.name] = replace(whole, ms=whole.ms + node.ms)
    return tuple(found.values())
