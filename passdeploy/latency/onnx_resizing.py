"""An ONNX graph at other widths, without exporting again: its initialisers are cut, its nodes stay.

The exporter names an initialiser after the parameter that it came from, so the slots of the channel groups say what to
cut. What a folded batch norm leaves (a bias without a parameter) follows the output channels of its layer.
The result is only for timing: the first channels stay, not the best ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from passdeploy.channels.costs import Factor
from passdeploy.channels.groups import ChannelGroup, cuts_whole_groups
from passdeploy.profiling.onnx_layers import OnnxLayer, find_layers

if TYPE_CHECKING:
    from onnx import ModelProto

_WITH_BIAS = {"Conv": 0, "ConvTranspose": 1}  # operator -> which dimension of its weight the bias runs along


class ResizableGraph:
    """An exported dense network, ready to be cut.

    Args:
        proto: the dense network as ONNX; it is left as it was.
        groups: the network's groups.
    """

    def __init__(self, proto: ModelProto, groups: Sequence[ChannelGroup]) -> None:
        from onnx import numpy_helper

        self._arrays: dict[str, np.ndarray] = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer
        }
        self._skeleton = type(proto)()
        self._skeleton.CopyFrom(_without_weights(proto))
        self._cuts: dict[str, list[tuple[ChannelGroup, int, np.ndarray]]] = {}  # initialiser -> group, dim, places
        for group in groups:
            for slot in group.slots if group.is_prunable else ():
                if slot.tensor in self._arrays:
                    self._cuts.setdefault(slot.tensor, []).append((group, slot.dim, slot.index.numpy()))
        self._follow_biases()
        self._free_flattenings()

    def layers(self) -> dict[str, OnnxLayer]:
        """Kernel -> layer, as `find_layers` tells."""
        dims = {}
        for name, cuts in self._cuts.items():
            sizes = list(self._arrays[name].shape)
            spans: list[list[tuple[str, int]]] = [[] for _ in sizes]
            for group, dim, places in cuts:
                spans[dim].append((group.name, places.shape[1]))
                sizes[dim] -= places.size
            dims[name] = [Factor(rest, tuple(sorted(along))) for rest, along in zip(sizes, spans, strict=True)]
        return find_layers(self._skeleton.graph, dims)

    def at(self, widths: Mapping[str, int]) -> ModelProto:
        """The graph in which every group keeps its first `widths[name]` channels."""
        from onnx import numpy_helper

        graph = type(self._skeleton)()
        graph.CopyFrom(self._skeleton)
        sizes: dict[str, tuple[int, ...]] = {}
        for name, whole in self._arrays.items():
            array = whole
            along: dict[int, list[np.ndarray]] = {}
            for group, dim, places in self._cuts.get(name, ()):
                along.setdefault(dim, []).append(places[widths.get(group.name, group.width) :].ravel())
            for dim, removed in along.items():
                array = np.delete(array, np.concatenate(removed), axis=dim)
            sizes[name] = array.shape
            graph.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        for node in graph.graph.node:
            self._count_groups_(node, sizes)
        return graph

    def _count_groups_(self, node: Any, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """A grouped convolution that lost whole groups says how many are left."""
        for attribute in node.attribute if node.op_type == "Conv" else ():
            if attribute.name == "group" and attribute.i > 1:
                outputs, per_group = self._arrays[node.input[1]].shape[:2]
                if cuts_whole_groups(attribute.i, per_group):
                    attribute.i = sizes[node.input[1]][0] // (outputs // attribute.i)

    def _follow_biases(self) -> None:
        for node in self._skeleton.graph.node:
            if node.op_type in _WITH_BIAS and len(node.input) > 2:
                weight, bias = node.input[1], node.input[2]
                if bias in self._arrays and bias not in self._cuts:
                    along = _WITH_BIAS[node.op_type]
                    cuts = [(group, 0, places) for group, dim, places in self._cuts.get(weight, ()) if dim == along]
                    if cuts:
                        self._cuts[bias] = cuts

    def _free_flattenings(self) -> None:
        """`x.flatten(1)` is exported with the size it has in the dense network; let it have any."""
        for node in self._skeleton.graph.node:
            shape = self._arrays.get(node.input[1]) if node.op_type == "Reshape" else None
            if shape is not None and len(shape) == 2 and shape[1] > 0:
                self._arrays[node.input[1]] = np.array([0, -1], shape.dtype)  # the batch, and all the rest
                del node.attribute[:]  # allowzero would take that 0 for a size


def _without_weights(proto: Any) -> Any:
    """The nodes and the ends; shapes in between are those of other widths, so they go."""
    bare = type(proto)()
    bare.ir_version = proto.ir_version
    bare.opset_import.extend(proto.opset_import)
    bare.functions.extend(proto.functions)
    bare.graph.name = proto.graph.name
    bare.graph.node.extend(proto.graph.node)
    bare.graph.input.extend(proto.graph.input)
    bare.graph.output.extend(proto.graph.output)
    return bare
