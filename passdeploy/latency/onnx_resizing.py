"""Resize an exported ONNX graph to other widths: initialisers are cut, nodes stay, and nothing is exported again.

The exporter names an initialiser after its parameter, so the slots of the channel groups say where to cut. The bias
that a folded batch norm leaves has no parameter; it is cut like the output channels of its layer. The result is for
timing only: the first channels stay, not the best ones.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from passdeploy.channels.costs import Factor
from passdeploy.channels.groups import ChannelGroup, cuts_whole_groups
from passdeploy.profiling.kernel_times import name_in_module
from passdeploy.profiling.onnx_layers import OnnxLayer, find_layers

if TYPE_CHECKING:
    from onnx import ModelProto

_SCOPES = "pkg.torch.onnx.name_scopes"  # metadata in which the exporter keeps the modules around a node
_WITH_BIAS = {"Conv": 0, "ConvTranspose": 1}  # operator -> dimension of its weight that holds output channels


class ResizableGraph:
    """ONNX graph of a dense network that can be cut to any widths.

    Args:
        proto: the dense network as ONNX; it is not changed.
        groups: the network's groups.
    """

    def __init__(self, proto: ModelProto, groups: Sequence[ChannelGroup]) -> None:
        from onnx import numpy_helper

        self._arrays: dict[str, np.ndarray] = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer
        }
        self._skeleton = type(proto)()
        self._skeleton.CopyFrom(_without_weights(proto))
        self._cuts: dict[str, list[tuple[ChannelGroup, int, np.ndarray]]] = {}  # initialiser -> group, dim, indices
        for group in groups:
            for slot in group.slots if group.is_prunable else ():
                if slot.tensor in self._arrays:
                    self._cuts.setdefault(slot.tensor, []).append((group, slot.dim, slot.index.numpy()))
        self._cut_biases_like_weights_()
        self._allow_any_flattened_size_()

    def layers(self) -> dict[str, OnnxLayer]:
        """Find the layer of every kernel, with sizes as functions of group widths (`find_layers`)."""
        dims = {}
        for name, cuts in self._cuts.items():
            sizes = list(self._arrays[name].shape)
            spans: list[list[tuple[str, int]]] = [[] for _ in sizes]
            for group, dim, indices in cuts:
                spans[dim].append((group.name, indices.shape[1]))
                sizes[dim] -= indices.size
            dims[name] = [Factor(fixed, tuple(sorted(span))) for fixed, span in zip(sizes, spans, strict=True)]
        return find_layers(self._skeleton.graph, dims)

    def at(self, widths: Mapping[str, int]) -> ModelProto:
        """Cut a copy of the graph so that every group keeps its first `widths[name]` channels."""
        from onnx import numpy_helper

        graph = type(self._skeleton)()
        graph.CopyFrom(self._skeleton)
        sizes: dict[str, tuple[int, ...]] = {}
        for name, whole in self._arrays.items():
            array = whole
            removed: dict[int, list[np.ndarray]] = {}  # dim -> indices
            for group, dim, indices in self._cuts.get(name, ()):
                removed.setdefault(dim, []).append(indices[widths.get(group.name, group.width) :].ravel())
            for dim, parts in removed.items():
                array = np.delete(array, np.concatenate(parts), axis=dim)
            sizes[name] = array.shape
            graph.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        for node in graph.graph.node:
            self._set_group_count_(node, sizes)
        return graph

    def _set_group_count_(self, node: Any, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Set the attribute `group` of a grouped convolution that lost whole groups."""
        for attribute in node.attribute if node.op_type == "Conv" else ():
            if attribute.name == "group" and attribute.i > 1:
                outputs, per_group = self._arrays[node.input[1]].shape[:2]
                if cuts_whole_groups(attribute.i, per_group):
                    attribute.i = sizes[node.input[1]][0] // (outputs // attribute.i)

    def _cut_biases_like_weights_(self) -> None:
        """Cut biases that are no parameters like the output channels of their layer's weight."""
        for node in self._skeleton.graph.node:
            if node.op_type in _WITH_BIAS and len(node.input) > 2:
                weight, bias = node.input[1], node.input[2]
                if bias in self._arrays and bias not in self._cuts:
                    out = _WITH_BIAS[node.op_type]
                    cuts = [(group, 0, indices) for group, dim, indices in self._cuts.get(weight, ()) if dim == out]
                    if cuts:
                        self._cuts[bias] = cuts

    def _allow_any_flattened_size_(self) -> None:
        """Replace the fixed size that `x.flatten(1)` is exported with by -1."""
        for node in self._skeleton.graph.node:
            shape = self._arrays.get(node.input[1]) if node.op_type == "Reshape" else None
            if shape is not None and len(shape) == 2 and shape[1] > 0:
                self._arrays[node.input[1]] = np.array([0, -1], shape.dtype)  # keep the batch, flatten the rest
                del node.attribute[:]  # with allowzero, 0 would be a size


def name_nodes_by_module_(proto: ModelProto) -> None:
    """Name every node, and its results, after the PyTorch module that it comes from.

    Exports of slim networks have these names in common, whatever blocks they skip. A runtime names a fused kernel after
    a node or after a result, see `find_layers`.
    """
    known, results = set[str](), dict[str, str]()
    is_fixed = {value.name for value in proto.graph.output}
    for node in proto.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "['']")
        modules = ast.literal_eval(scopes)[:-1]  # the last one is the operator
        node.name = name_in_module(modules[-1] if modules else "", node.op_type, known)
        known.add(node.name)
        for number, result in enumerate(node.output):
            if result and result not in is_fixed:
                results[result] = f"{node.name}:{number}"
    if any(attribute.HasField("g") for node in proto.graph.node for attribute in node.attribute):
        return  # a graph inside of a node may read any result
    del proto.graph.value_info[:]  # shapes, by the old names
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [results.get(name, name) for name in names]


def _without_weights(proto: Any) -> Any:
    """Copy nodes, inputs and outputs; drop weights and the shapes of intermediate tensors, which change with widths."""
    skeleton = type(proto)()
    skeleton.ir_version = proto.ir_version
    skeleton.opset_import.extend(proto.opset_import)
    skeleton.functions.extend(proto.functions)
    skeleton.graph.name = proto.graph.name
    skeleton.graph.node.extend(proto.graph.node)
    skeleton.graph.input.extend(proto.graph.input)
    skeleton.graph.output.extend(proto.graph.output)
    return skeleton
