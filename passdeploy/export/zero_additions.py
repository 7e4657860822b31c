"""Take out the additions of a zero that a skipped block leaves in an exported graph, where its branch was added.

ONNX Runtime and TensorRT would keep each of them as a kernel that reads and writes a whole tensor.
"""

from __future__ import annotations

from typing import Any


def remove_zero_additions_(proto: Any) -> int:
    """Remove every `Add` of a zero that broadcasts to the other summand, and what only made that zero.

    Args:
        proto: an `onnx.ModelProto`, changed in place.

    Returns:
        The number of additions that were removed; none in a graph with control flow.
    """
    graph = proto.graph
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return 0  # a branch or a loop may use any tensor
    zeros = _single_zeros(graph)
    ranks = {info.name: len(info.type.tensor_type.shape.dim) for info in (*graph.value_info, *graph.input)}
    kept = {output.name for output in graph.output}
    stands_for: dict[str, str] = {}  # result of a removed addition -> the summand that it equals
    for node in graph.node:
        if node.op_type != "Add" or node.output[0] in kept:
            continue
        for zero, other in (node.input, reversed(node.input)):
            if zero in zeros and ranks.get(other, -1) >= zeros[zero]:
                stands_for[node.output[0]] = stands_for.get(other, other)
                break
    left = [node for node in graph.node if not stands_for.keys() & set(node.output)]
    for node in left:
        node.input[:] = [stands_for.get(name, name) for name in node.input]
    used = {name for node in left for name in node.input} | kept
    left = [node for node in left if node.op_type != "ConstantOfShape" or used.intersection(node.output)]
    used = {name for node in left for name in node.input} | kept
    _keep_only(graph.node, left)
    _keep_only(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])
    _keep_only(graph.value_info, [info for info in graph.value_info if info.name not in stands_for])
    return len(stands_for)


def _single_zeros(graph: Any) -> dict[str, int]:
    """Map the names of tensors that hold a single zero to their ranks: those that `ConstantOfShape` makes."""
    from onnx import numpy_helper

    shapes = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and node.input[0] in shapes:
            shape = numpy_helper.to_array(shapes[node.input[0]])
            values = [numpy_helper.to_array(item.t) for item in node.attribute if item.name == "value"]
            if (shape == 1).all() and not any(value.any() for value in values):
                found[node.output[0]] = len(shape)
    return found


def _keep_only(entries: Any, kept: list[Any]) -> None:
    """Leave only these entries in a repeated field."""
    if len(kept) < len(entries):
        copies = [type(entry).FromString(entry.SerializeToString()) for entry in kept]
        del entries[:]
        entries.extend(copies)
