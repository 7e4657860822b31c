"""Rules for operations that move elements: views, permutations, slices, constant padding, concatenation, indexing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from passdeploy.tracing.labels import NONE
from passdeploy.tracing.op_call import OpCall, aten
from passdeploy.tracing.rules.elementwise import join_operands
from passdeploy.tracing.rules.registry import rule
from passdeploy.tracing.trace import DimLabels
from passdeploy.tracing.tracer import ChannelTracer


@rule("permute", "transpose", "t", "movedim", "squeeze", "unsqueeze")
@rule("expand", "slice", "select", "narrow", "unbind", "split", "split_with_sizes", "chunk", "flip", "roll")
@rule("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")
@rule("unfold", "repeat", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "diagonal")
@rule("native_channel_shuffle", "tile", "repeat_interleave")
@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "_reshape_copy")
def movement_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Compute the labels of the results by applying the operation to the labels."""
    source, labels = call.tensors[0], tracer.labels(call.tensors[0])
    if call.packet in (aten.split, aten.unsafe_split):
        _join_equal_parts(tracer, call, call["dim"], call["split_size"])
    if call.packet in (aten.channel_shuffle, aten.native_channel_shuffle):
        _join_equal_parts(tracer, call, 1, source.size(1) // call["groups"])
    if call.packet is aten.slice and call["step"] > 1:
        _join_strides(tracer, call)
    if call.packet is aten.select:
        _protect_up_to_selected(tracer, call)
    if call.packet is aten.roll:
        _protect_rolled(tracer, call)
    result_labels: list[DimLabels] = [{} for _ in call.results]
    is_view = call.packet in _RESHAPING_VIEWS
    for dim, vector in labels.items():
        if is_view:
            moved = [_view_labels(vector, dim, source.shape, call.results[0].shape)]
        else:
            moved = _run_on_labels(call, _expand_labels(vector, dim, source.shape))
        for target, values in zip(result_labels, moved, strict=True):
            for new_dim, new in tracer.collapse_recording_choice(values).items():
                if new_dim in target:  # two dimensions were merged: the one with fewer channels must stay
                    few, many = sorted((target[new_dim], new), key=lambda v: len(v.unique()))
                    tracer.protect(few, "two kinds of channels share one dimension")
                    new = many
                target[new_dim] = new
    for result, dims in zip(call.results, result_labels, strict=True):
        tracer.set_labels(result, dims)


def _join_equal_parts(tracer: ChannelTracer, call: OpCall, dim: int, size: int) -> None:
    """Join the channels at the same index of every part of a `chunk`, `split` or channel shuffle.

    Slim networks split equally, too.
    """
    vector = tracer.labels(call.tensors[0]).get(dim % call.tensors[0].ndim)
    if vector is not None and len(vector) > size:
        if len(vector) % size:
            tracer.protect(vector, "split into parts of unequal size")
        else:
            tracer.union_find.join_rows(
                vector.view(-1, size).T, tracer.reason("at the place of channels that must stay")
            )


def _join_strides(tracer: ChannelTracer, call: OpCall) -> None:
    """Join the channels inside every stride of a slice: only if whole strides are removed, others are still picked."""
    dim, step = call["dim"] % call.tensors[0].ndim, call["step"]
    vector = tracer.labels(call.tensors[0]).get(dim)
    if vector is None:
        return
    if len(vector) % step or not 0 <= (call["start"] or 0) < step:
        tracer.protect(vector, "every few of these channels are picked")
    else:
        tracer.union_find.join_rows(vector.view(-1, step), tracer.reason("in one stride with channels that must stay"))


def _protect_up_to_selected(tracer: ChannelTracer, call: OpCall) -> None:
    """Protect the channel at a stated place, and those by which the place is counted: from the first, or the last."""
    vector, index = tracer.labels(call.tensors[0]).get(call["dim"] % call.tensors[0].ndim), call["index"]
    if vector is not None:
        tracer.protect(
            vector[: index + 1] if index >= 0 else vector[index:], "one of these channels is picked by its place"
        )


def _protect_rolled(tracer: ChannelTracer, call: OpCall) -> None:
    """Protect the channels along which a tensor is rolled by a number of places: how many of these are left is open."""
    source, labels = call.tensors[0], tracer.labels(call.tensors[0])
    dims = [dim % source.ndim for dim in call["dims"]] or range(source.ndim)  # without dims it is rolled as one row
    for dim in labels.keys() & {*dims}:
        tracer.protect(labels[dim], "they are shifted by a number of places")


def _expand_labels(vector: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Expand labels along one dimension to one label per element of the tensor, as a view that takes no memory."""
    ones = [1] * len(shape)
    ones[dim] = -1
    return vector.view(ones).expand(*shape)


def _run_on_labels(call: OpCall, element_labels: Tensor) -> list[Tensor]:
    """Run the operation on labels in place of values."""
    arguments = dict(call.arguments)
    first = next(name for name, value in arguments.items() if isinstance(value, Tensor))
    arguments[first] = element_labels
    result = call.op(**arguments)
    return [result] if isinstance(result, Tensor) else list(result)


_RESHAPING_VIEWS = (aten.view, aten._unsafe_view, aten._reshape_alias)


def _view_labels(vector: Tensor, dim: int, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Compute one label per element of a viewed tensor from the labels along one dimension of the old shape.

    A view divides and merges neighbouring dimensions. Only those that are merged with `dim` are materialised; the
    others stay expanded, since all together would take as much memory as the tensor.
    """
    if 0 in old:
        return _expand_labels(vector, dim, old).reshape(list(new))
    before, after = [1, *accumulate(old, mul)], [1, *accumulate(new, mul)]  # elements up to each dimension
    start = max(position for position in range(dim + 1) if before[position] in after)
    end = min(position for position in range(dim + 1, len(old) + 1) if before[position] in after)
    begin, stop = after.index(before[start]), after.index(before[end])
    block = _expand_labels(vector, dim - start, old[start:end]).reshape(list(new[begin:stop]))
    return block.view([*[1] * begin, *block.shape, *[1] * (len(new) - stop)]).expand(*new)


@rule("im2col")
def im2col_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Repeat the label of each channel for the places of its window, which become channels of their own."""
    source, places = call["self"], call["kernel_size"][0] * call["kernel_size"][1]
    channel_dim, labels = source.ndim - 3, tracer.labels(source)
    for dim, vector in labels.items():
        if dim > channel_dim:
            tracer.protect(vector, "a window slides along these channels")
    kept = {dim: vector for dim, vector in labels.items() if dim < channel_dim}
    if channel_dim in labels:
        kept[channel_dim] = labels[channel_dim].repeat_interleave(places)
    tracer.set_labels(call.result, kept)


@rule("col2im")
def col2im_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Join the places of every window of a channel, which are added to one channel."""
    source, places = call["self"], call["kernel_size"][0] * call["kernel_size"][1]
    channel_dim, labels = source.ndim - 2, tracer.labels(source)
    if (positions := labels.get(channel_dim + 1)) is not None:
        tracer.protect(positions, "windows are put together along these channels")
    kept = {dim: vector for dim, vector in labels.items() if dim < channel_dim}
    if channel_dim in labels:
        reason = tracer.reason("in one window with channels that must stay")
        kept[channel_dim] = tracer.union_find.join_rows(labels[channel_dim].view(-1, places), reason)
    tracer.set_labels(call.result, kept)


@rule("constant_pad_nd")
def pad_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Pad the labels of a padded channel dimension with NONE; padding of space changes no channels."""
    ndim, amounts = call.result.ndim, list(call["pad"])
    labels = {}
    for dim, vector in tracer.labels(call["self"]).items():
        before, after = [*amounts[2 * (ndim - 1 - dim) :], 0, 0][:2]
        cropped = vector[max(-before, 0) : len(vector) - max(-after, 0)]
        labels[dim] = torch.nn.functional.pad(cropped, (max(before, 0), max(after, 0)), value=NONE)
    tracer.set_labels(call.result, labels)


@rule("cat", "concat")
def cat_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Concatenate the labels along the concatenated dimension, and join those along all others."""
    parts = [part for part in call["tensors"] if part.ndim == call.result.ndim]  # torch skips empty 1-d ones
    concat_dim = call["dim"] % call.result.ndim
    across: list[tuple[Sequence[int], DimLabels]] = []
    along: list[Tensor] = []
    for part in parts:
        labels = dict(tracer.labels(part))
        along.append(labels.pop(concat_dim, torch.full((part.size(concat_dim),), NONE)))
        across.append(([1 if dim == concat_dim else size for dim, size in enumerate(part.shape)], labels))
    result = join_operands(tracer, across, call.result.ndim)
    if (vector := torch.cat(along)).any():
        result[concat_dim] = vector
    tracer.set_labels(call.result, result)


@rule("stack")
def stack_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Join the labels of stacked tensors along every dimension but the new one."""
    new_dim = call["dim"] % call.result.ndim
    operands = [(tensor.shape, tracer.labels(tensor)) for tensor in call["tensors"]]
    labels = join_operands(tracer, operands, call.result.ndim - 1)
    tracer.set_labels(call.result, {dim + (dim >= new_dim): vector for dim, vector in labels.items()})


@rule("index", "index_select", "gather", "embedding", "take", "masked_select", "_unsafe_index")
def index_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Keep the labels of dimensions without an index, and protect those of the indexed ones and of the indices."""
    _label_picked(tracer, call)
    tracer.protect_all(call.tensors[1:], "used as an index")


def _label_picked(tracer: ChannelTracer, call: OpCall) -> None:
    if call.packet is aten.embedding:
        table, index = call["weight"], call["indices"]
        labels = tracer.labels(table)
        tracer.protect(labels.get(0, torch.empty(0, dtype=torch.int64)), "rows of a table are picked by an index")
        tracer.set_labels(call.result, {index.ndim: labels[1]} if 1 in labels else {})
        if 1 in labels:
            tracer.record_outputs(labels[1])
        return
    source, labels = call.tensors[0], tracer.labels(call.tensors[0])
    if call.packet is aten.index_select:
        picked = {call["dim"] % source.ndim}
        kept = {dim: vector for dim, vector in labels.items() if dim not in picked}
    elif call.packet in (aten.index, aten._unsafe_index) and len(call.tensors) > 1:
        indices = list(call["indices"]) + [None] * (source.ndim - len(call["indices"]))
        used = [dim for dim, index in enumerate(indices) if index is not None]
        has_mask = any(indices[dim].dtype == torch.bool for dim in used)
        if has_mask or used != list(range(used[0], used[-1] + 1)):  # boolean or scattered indices move dimensions
            tracer.protect_all(call.tensors, "picked by an index")
            return
        picked, shift = set(used), max(indices[dim].ndim for dim in used) - len(used)
        kept = {dim + shift * (dim > used[-1]): vector for dim, vector in labels.items() if dim not in picked}
    else:
        tracer.protect_all(call.tensors, "picked by an index")
        return
    for dim in picked & labels.keys():
        tracer.protect(labels[dim], "picked by an index")
    tracer.set_labels(call.result, kept)
