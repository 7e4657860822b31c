"""Layer times: compare the dense and the slim network layer by layer, and explain layers that became no faster.

ONNX Runtime's profiler times the kernels of both files. Kernels are matched by the weights that they read, whose names
are the same in both. Profiling slows a network down, so the figures show the shares of the layers, not absolute times.
Other backends are traced in `profiling/layer_traces.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from passdeploy.channels.blocks import is_inside
from passdeploy.channels.costs import Factor
from passdeploy.channels.groups import ChannelGroup
from passdeploy.profiling.onnx_layers import find_layers, merge_by_layer
from passdeploy.profiling.ort_profiler import node_times, profile_kernels

if TYPE_CHECKING:
    from onnx import GraphProto

_BEHIND_PROMPT = "network."  # prefix of the layer names of a network behind a visual prompt
ELSEWHERE = "(between layers)"  # pooling, additions, copies: kernels without a weight
_PASS_THROUGH = ("Cast", "QuantizeLinear", "DequantizeLinear", "Transpose")  # may stand between a weight and its layer
_QUANTISED = "_quantized"  # suffix of the name of a weight in int8
_FEWEST_CALLS = 10
_SHORT_MS = 0.01  # a kernel shorter than this is mostly launch overhead
_SLOWER_THAN_MACS = 1.25  # relative to the time that the remaining multiply-adds suggest


@dataclass(frozen=True)
class LayerTime:
    """The time of one layer of one network."""

    name: str
    weight: tuple[int, ...]  # shape of its weight; empty for kernels without one
    is_depthwise: bool
    ms: float


@dataclass(frozen=True)
class LayerChange:
    """The times and widths of one layer in both networks."""

    name: str
    dense_ms: float
    slim_ms: float
    dense_channels: tuple[int, ...]  # out, in
    slim_channels: tuple[int, ...]  # none of a layer that went with its block
    why: str  # the reason that it gained less than its multiply-adds suggest; empty where it gained as much
    group: str = ""  # channel group of its output channels; empty where they belong to none

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain lists and values."""
        fields = asdict(self)
        return {**fields, **{key: list(fields[key]) for key in ("dense_channels", "slim_channels")}}


def trace_onnx_layers(path: Path, images: Tensor, *, threads: int, seconds: float = 1.0) -> list[LayerTime]:
    """Time the layers of an ONNX file with ONNX Runtime's profiler, in the order of a call.

    Args:
        path: the file.
        images: the batch, shape (batch, 3, height, width).
        threads: of ONNX Runtime.
        seconds: at least this long.
    """
    import onnx

    graph = onnx.load(path).graph
    weighted = weighted_nodes(graph)
    sizes = {name: [Factor(size, ()) for size in layer.weight] for name, layer in weighted.items()}
    layers = find_layers(graph, {node.input[1]: sizes[node.name] for node in graph.node if node.name in weighted})
    events = profile_kernels(path, images, threads=threads, fewest_calls=_FEWEST_CALLS, seconds=seconds)
    times, other_ms = [], 0.0
    for node in merge_by_layer(node_times(events), layers):
        if node.sizes is None:
            other_ms += node.ms
        else:
            times.append(replace(weighted[node.name], ms=node.ms))
    return [*times, LayerTime(ELSEWHERE, (), False, other_ms)]


def weighted_nodes(graph: GraphProto) -> dict[str, LayerTime]:
    """Map the names of ONNX nodes with a weight, also a cast or quantised one, to their layers, with 0 milliseconds."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    origin = {node.output[0]: node.input[0] for node in graph.node if node.op_type in _PASS_THROUGH}
    layers = {}
    for node in graph.node:
        weight = node.input[1] if len(node.input) > 1 and node.op_type not in _PASS_THROUGH else ""
        while weight in origin:
            weight = origin[weight]
        if len(shapes.get(weight, ())) >= 2:
            groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
            is_depthwise = groups > 1 and shapes[weight][1] == 1
            name = weight.removesuffix(_QUANTISED).removesuffix(".weight")
            layers[node.name] = LayerTime(name, shapes[weight], is_depthwise, 0.0)
    return layers


def compare_layers(
    dense: Sequence[LayerTime],
    slim: Sequence[LayerTime],
    *,
    block: int,
    groups: Sequence[ChannelGroup] = (),
    gone: Sequence[str] = (),
) -> list[LayerChange]:
    """Match the layers of both networks, in the dense one's order.

    Args:
        dense: layers of the dense network.
        slim: those of the slim one, with the same names, or behind a visual prompt.
        block: channels that a kernel computes together.
        groups: channel groups of the dense network; a layer belongs to the group of its output channels.
        gone: modules that went with skipped blocks; their layers take no time.
    """
    slim_layers = {layer.name: layer for layer in slim}
    group_of = {slot.layer: group.name for group in groups for slot in group.slots if slot.is_output}
    changes = []
    for before in dense:
        now = slim_layers.get(before.name) or slim_layers.get(_BEHIND_PROMPT + before.name)
        if now is not None:
            channels = before.weight[:2], now.weight[:2]
            group, why = group_of.get(before.name, ""), _why_slower(before, now, block)
            changes.append(LayerChange(before.name, before.ms, now.ms, *channels, why, group))
        elif any(is_inside(before.name, module) for module in gone):
            group = group_of.get(before.name, "")
            changes.append(LayerChange(before.name, before.ms, 0.0, before.weight[:2], (), "", group))
    return changes


def _why_slower(before: LayerTime, now: LayerTime, block: int) -> str:
    """Name the reason that a layer is slower than its remaining multiply-adds suggest; empty if it is not."""
    if not before.weight or prod(now.weight) == prod(before.weight):
        return ""
    expected_ms = prod(now.weight) / prod(before.weight) * before.ms
    if now.ms <= _SLOWER_THAN_MACS * expected_ms:
        return ""
    if before.is_depthwise:
        return "depthwise: bound by memory, not by multiply-adds"
    if now.ms < _SHORT_MS:
        return "launch-bound: as short as a call can be"
    unaligned = [
        width for width, old in zip(now.weight[:2], before.weight[:2], strict=True) if width % block and width != old
    ]
    if unaligned:
        padded = -(-unaligned[0] // block) * block
        return f"{unaligned[0]} channels are computed as {padded}: kernels take {block} together"
    return "bound by memory or by what does not shrink with the channels"


def by_group(changes: Sequence[LayerChange]) -> list[dict[str, Any]]:
    """Sum the layer times by channel group, the slowest of the slim network first; a layer without a group is a row.

    Returns:
        A row per group: its name, its layers, its width (None: unknown, or gone) and its milliseconds in both networks,
        its share of the slim network's time, and the reasons that its layers gained less than their multiply-adds
        suggest.
    """
    slim_ms = sum(change.slim_ms for change in changes)
    parts: dict[str, list[LayerChange]] = {}
    for change in changes:
        parts.setdefault(change.group or change.name, []).append(change)
    rows = [
        {
            "group": name,
            "layers": [change.name for change in part],
            "dense_width": _width(change.dense_channels for change in part),
            "slim_width": _width(change.slim_channels for change in part),
            "dense_ms": sum(change.dense_ms for change in part),
            "slim_ms": sum(change.slim_ms for change in part),
            "share": sum(change.slim_ms for change in part) / slim_ms if slim_ms else 0.0,
            "why": "; ".join(dict.fromkeys(change.why for change in part if change.why)),
        }
        for name, part in parts.items()
    ]
    return sorted(rows, key=lambda row: -float(str(row["slim_ms"])))


def _width(channels: Iterable[tuple[int, ...]]) -> int | None:
    """Return the output channels of the first layer that has some."""
    return next((of_layer[0] for of_layer in channels if of_layer), None)
