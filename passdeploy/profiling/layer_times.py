"""Where the time goes, layer by layer, before and after: and why a layer that lost channels is no faster.

ONNX Runtime's profiler times the kernels of both files; kernels are told by the weights that they read, whose names
both share. Profiling slows a network down, so the figures say where time goes, not how much there is of it. Other
backends are looked into by `passdeploy.latency.traces`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from passdeploy.channels.costs import Factor
from passdeploy.channels.groups import ChannelGroup
from passdeploy.profiling.onnx_layers import by_layer, find_layers
from passdeploy.profiling.ort_profiler import node_times, profile_kernels

if TYPE_CHECKING:
    from onnx import ModelProto

_BEHIND_PROMPT = "network."  # what the names of a network behind a visual prompt begin with
ELSEWHERE = "(between layers)"  # pooling, additions, copies: kernels without a weight
_FEW_CALLS = 10
_SHORT_MS = 0.01  # below this a kernel is mostly its call
_SLOWER_THAN_MACS = 1.25  # relative to what the multiply-adds promise


@dataclass(frozen=True)
class LayerTime:
    """One layer of one file."""

    name: str
    weight: tuple[int, ...]  # its shape; empty for what has none
    is_depthwise: bool
    ms: float


@dataclass(frozen=True)
class LayerChange:
    """One layer in both networks."""

    name: str
    dense_ms: float
    slim_ms: float
    dense_channels: tuple[int, ...]  # out, in
    slim_channels: tuple[int, ...]
    why: str  # it gained less than its multiply-adds promise; empty where it did not
    group: str = ""  # of its output channels; empty where they belong to none

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found = asdict(self)
        return {**found, **{key: list(found[key]) for key in ("dense_channels", "slim_channels")}}


def trace_layers(path: Path, images: Tensor, *, threads: int, seconds: float = 1.0) -> list[LayerTime]:
    """Run an ONNX file under ONNX Runtime's profiler, in the order of a call.

    Args:
        path: the file.
        images: the batch, shape (batch, 3, height, width).
        threads: of ONNX Runtime.
        seconds: about how long.
    """
    import onnx

    graph: ModelProto = onnx.load(path)
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
    reads = {node.name: node for node in graph.graph.node if len(node.input) > 1 and node.input[1] in weights}
    layers = find_layers(graph.graph, {name: [Factor(size, ()) for size in dims] for name, dims in weights.items()})
    events = profile_kernels(path, images, threads=threads, fewest_calls=_FEW_CALLS, seconds=seconds)
    found, rest = [], 0.0
    for node in by_layer(node_times(events), layers):
        if node.sizes is None:
            rest += node.ms
            continue
        made = reads[node.name]
        shape = weights[made.input[1]]
        groups = next((attribute.i for attribute in made.attribute if attribute.name == "group"), 1)
        found.append(LayerTime(made.input[1].removesuffix(".weight"), shape, groups > 1 and shape[1] == 1, node.ms))
    return [*found, LayerTime(ELSEWHERE, (), False, rest)]


def compare_layers(
    dense: Sequence[LayerTime], slim: Sequence[LayerTime], *, block: int, groups: Sequence[ChannelGroup] = ()
) -> list[LayerChange]:
    """Both networks layer by layer, in the dense one's order.

    Args:
        dense: layers of the dense network.
        slim: those of the slim one, with the same names, or behind a visual prompt.
        block: channels that a kernel computes together.
        groups: of the dense network: a layer belongs to the group of its output channels.
    """
    after = {layer.name: layer for layer in slim}
    home = {slot.layer: group.name for group in groups for slot in group.slots if slot.is_output}
    changes = []
    for before in dense:
        now = after.get(before.name) or after.get(_BEHIND_PROMPT + before.name)
        if now is not None:
            channels = before.weight[:2], now.weight[:2]
            group, why = home.get(before.name, ""), _why(before, now, block)
            changes.append(LayerChange(before.name, before.ms, now.ms, *channels, why, group))
    return changes


def _why(before: LayerTime, now: LayerTime, block: int) -> str:
    """Why a layer is slower than the multiply-adds that it has left would have it."""
    if not before.weight or prod(now.weight) == prod(before.weight):
        return ""
    promised = prod(now.weight) / prod(before.weight) * before.ms
    if now.ms <= _SLOWER_THAN_MACS * promised:
        return ""
    if before.is_depthwise:
        return "depthwise: bound by memory, not by multiply-adds"
    if now.ms < _SHORT_MS:
        return "launch-bound: as short as a call can be"
    odd = [
        width for width, old in zip(now.weight[:2], before.weight[:2], strict=True) if width % block and width != old
    ]
    if odd:
        padded = -(-odd[0] // block) * block
        return f"{odd[0]} channels are computed as {padded}: kernels take {block} together"
    return "bound by memory or by what does not shrink with the channels"


def by_group(changes: Sequence[LayerChange]) -> list[dict[str, Any]]:
    """The same by channel group, the slowest of the slim network first; layers without a group stand by themselves.

    Returns:
        A row per group: its name, its layers, its width and its milliseconds in both networks, its share of the slim
        network's time, and why its layers gained less than their multiply-adds promise.
    """
    whole = sum(change.slim_ms for change in changes)
    parts: dict[str, list[LayerChange]] = {}
    for change in changes:
        parts.setdefault(change.group or change.name, []).append(change)
    rows = [
        {
            "group": name,
            "layers": [change.name for change in part],
            "dense_width": part[0].dense_channels[0] if part[0].dense_channels else None,
            "slim_width": part[0].slim_channels[0] if part[0].slim_channels else None,
            "dense_ms": sum(change.dense_ms for change in part),
            "slim_ms": sum(change.slim_ms for change in part),
            "share": sum(change.slim_ms for change in part) / whole if whole else 0.0,
            "why": "; ".join(dict.fromkeys(change.why for change in part if change.why)),
        }
        for name, part in parts.items()
    ]
    return sorted(rows, key=lambda row: -float(str(row["slim_ms"])))
