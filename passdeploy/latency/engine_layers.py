"""Engine layers: spread the times of a TensorRT engine's layers over the layers of the network with a weight.

TensorRT fuses nodes of the ONNX graph and names an engine layer after all of them. The layers of the network are told
by these names. A layer of the engine without any (a pooling, an addition, a change of format) counts to the layer
before it, whose channels it works on; a layer of the network that no name tells is part of a larger fused block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from passdeploy.channels.costs import Factor
from passdeploy.profiling.kernel_times import NodeTime, Shape
from passdeploy.profiling.onnx_layers import OnnxLayer, nodes_named_in

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class EngineLayer:
    """A layer of the network as its nodes in a latency table show it."""

    name: str  # of the ONNX node
    kind: str  # its operator
    shapes: tuple[Shape, ...]  # of its input, weight and output in the dense network
    sizes: tuple[Factor, ...]  # channel widths that its time depends on


def engine_layers(graph: ModelProto, layers: Mapping[str, OnnxLayer]) -> tuple[EngineLayer, ...]:
    """List the weighted layers of the dense graph in its order, with their shapes.

    Args:
        graph: the dense network, with weights and a fixed batch.
        layers: name of a node -> its layer, as `find_layers` makes it.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(graph).graph
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    found = []
    for node in inferred.node:
        layer = layers.get(node.name)
        if layer is not None and layer.name == node.name:
            ends = (*node.input[:2], node.output[0])
            kind = f"{node.op_type} in groups" if _groups(node) > 1 else str(node.op_type)
            found.append(EngineLayer(node.name, kind, tuple(shapes.get(end, ()) for end in ends), layer.sizes))
    return tuple(found)


def spread_over_layers(
    times: Mapping[str, float], layers: Sequence[EngineLayer], names: Mapping[str, OnnxLayer]
) -> tuple[NodeTime, ...]:
    """Convert the times of an engine's layers to those of the network's layers; both add up to the same.

    Args:
        times: name of an engine's layer -> milliseconds, in the order of execution.
        layers: of the network, in the order of the graph.
        names: name of an ONNX node -> the layer of the network it belongs to.
    """
    order = {layer.name: number for number, layer in enumerate(layers)}
    spent = [0.0] * len(layers)
    current, is_told = 0, [False] * len(layers)
    for name, ms in times.items():
        nodes = nodes_named_in(name.replace("...", " "))  # a long block begins with the first layer that it names
        told = [order[names[node].name] for node in nodes if node in names]
        if told:
            current = told[0]
            is_told[current] = True
        spent[current] += ms
    shares = _share_with_untold(spent, is_told)
    return tuple(
        NodeTime(layer.name, layer.kind, layer.shapes, 2, ms, layer.sizes)
        for layer, ms in zip(layers, shares, strict=True)
    )


def _share_with_untold(spent: Sequence[float], is_told: Sequence[bool]) -> list[float]:
    """Divide the time of each layer equally with the layers after it that no name tells."""
    shares = list(spent)
    start = 0
    for end in range(1, len(spent) + 1):
        if end == len(spent) or is_told[end]:
            shares[start:end] = [sum(spent[start:end]) / (end - start)] * (end - start)
            start = end
    return shares


def _groups(node: Any) -> int:
    """Return the number of groups of a convolution, 1 for other nodes."""
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "group"), 1)
