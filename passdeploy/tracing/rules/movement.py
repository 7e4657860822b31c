"""What moves channels about: views, slices, joins and picks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from passdeploy.tracing.labels import NONE
from passdeploy.tracing.op_call import OpCall
from passdeploy.tracing.rules.elementwise import joined
from passdeploy.tracing.rules.registry import aten, rule
from passdeploy.tracing.trace import DimLabels
from passdeploy.tracing.tracer import Walk


@rule(
    "permute",
    "transpose",
    "transpose_",
    "t",
    "t_",
    "movedim",
    "squeeze",
    "squeeze_",
    "unsqueeze",
    "unsqueeze_",
)
@rule("expand", "slice", "select", "narrow", "unbind", "split", "split_with_sizes", "chunk", "flip", "roll")
@rule("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")
@rule("unfold", "repeat", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "diagonal", "as_strided_copy")
@rule("native_channel_shuffle", "view_copy", "tile", "repeat_interleave")
@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "_reshape_copy")
def movement(walk: Walk, call: OpCall) -> None:
    """Do to a tensor's labels what was done to the tensor."""
    source, labels = call.tensors[0], walk.labels(call.tensors[0])
    if call.op.overloadpacket in (aten.split, aten.unsafe_split):
        _keep_halves_equal(walk, call)
    found: list[DimLabels] = [{} for _ in call.results]
    is_view = call.op.overloadpacket in _VIEWS
    for dim, vector in labels.items():
        if is_view:
            moved = [_viewed(vector, dim, source.shape, call.results[0].shape)]
        else:
            moved = _moved(call, _spread(vector, dim, source.shape))
        for target, values in zip(found, moved, strict=True):
            for new_dim, new in walk.box(values).items():
                if new_dim in target:  # two dimensions became one: only the more numerous stay removable
                    few, many = sorted((target[new_dim], new), key=lambda v: len(v.unique()))
                    walk.protect(few, "two kinds of channels share one dimension")
                    new = many
                target[new_dim] = new
    for result, dims in zip(call.results, found, strict=True):
        walk.set_labels(result, dims)


def _keep_halves_equal(walk: Walk, call: OpCall) -> None:
    """`chunk` and `split` into equal parts will do so again on the slim network: the parts lose the same places."""
    dim = call["dim"] % call.tensors[0].ndim
    vector, size = walk.labels(call.tensors[0]).get(dim), call["split_size"]
    if vector is not None and len(vector) > size:
        if len(vector) % size:
            walk.protect(vector, "split into parts of unequal size")
        else:
            walk.union_find.join_rows(vector.view(-1, size).T, walk.reason("at the place of channels that must stay"))


def _spread(vector: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels along one dimension as a field over the whole tensor, without using its memory."""
    ones = [1] * len(shape)
    ones[dim] = -1
    return vector.view(ones).expand(*shape)


def _moved(call: OpCall, field: Tensor) -> list[Tensor]:
    """The operation, run on labels in place of values."""
    arguments = dict(call.arguments)
    first = next(name for name, value in arguments.items() if isinstance(value, Tensor))
    arguments[first] = field
    result = call.op(**arguments)
    return [result] if isinstance(result, Tensor) else list(result)


_VIEWS = (aten.view, aten._unsafe_view, aten._reshape_alias)


def _viewed(vector: Tensor, dim: int, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Labels along one dimension as a field over the tensor in its new shape.

    A view divides and merges neighbours: of the others nothing is spelled out, for that would take as much memory as
    the tensor. (It could not be a view, either: a spread field has no strides for that.)
    """
    if 0 in old:
        return _spread(vector, dim, old).reshape(list(new))
    before, after = [1, *accumulate(old, mul)], [1, *accumulate(new, mul)]  # elements up to each dimension
    start = max(place for place in range(dim + 1) if before[place] in after)
    end = min(place for place in range(dim + 1, len(old) + 1) if before[place] in after)
    begin, stop = after.index(before[start]), after.index(before[end])
    block = _spread(vector, dim - start, old[start:end]).reshape(list(new[begin:stop]))
    return block.view([*[1] * begin, *block.shape, *[1] * (len(new) - stop)]).expand(*new)


@rule("constant_pad_nd")
def pad(walk: Walk, call: OpCall) -> None:
    """Along their dimension channels get neighbours that must stay; padding of space belongs to each channel."""
    ndim, amounts = call.result.ndim, list(call["pad"])
    labels = {}
    for dim, vector in walk.labels(call["self"]).items():
        before, after = [*amounts[2 * (ndim - 1 - dim) :], 0, 0][:2]
        cropped = vector[max(-before, 0) : len(vector) - max(-after, 0)]
        labels[dim] = torch.nn.functional.pad(cropped, (max(before, 0), max(after, 0)), value=NONE)
    walk.set_labels(call.result, labels)


@rule("cat", "concat")
def concatenate(walk: Walk, call: OpCall) -> None:
    """Along the joint the labels follow one another; across it they are joined."""
    parts = [part for part in call["tensors"] if part.ndim == call.result.ndim]  # torch skips empty 1-d ones
    joint = call["dim"] % call.result.ndim
    across: list[tuple[Sequence[int], DimLabels]] = []
    along: list[Tensor] = []
    for part in parts:
        labels = dict(walk.labels(part))
        along.append(labels.pop(joint, torch.full((part.size(joint),), NONE)))
        across.append(([1 if dim == joint else size for dim, size in enumerate(part.shape)], labels))
    result = joined(walk, across, call.result.ndim)
    if (vector := torch.cat(along)).any():
        result[joint] = vector
    walk.set_labels(call.result, result)


@rule("stack")
def stack(walk: Walk, call: OpCall) -> None:
    """Stacked tensors share every dimension but the new one."""
    joint = call["dim"] % call.result.ndim
    operands = [(tensor.shape, walk.labels(tensor)) for tensor in call["tensors"]]
    labels = joined(walk, operands, call.result.ndim - 1)
    walk.set_labels(call.result, {dim + (dim >= joint): vector for dim, vector in labels.items()})


@rule("index", "index_select", "gather", "embedding", "take", "masked_select", "_unsafe_index")
def picking(walk: Walk, call: OpCall) -> None:
    """Rows picked by an index keep the channels of the dimensions that no index runs along."""
    if call.op.overloadpacket is aten.embedding:
        table, index = call["weight"], call["indices"]
        labels = walk.labels(table)
        walk.protect(labels.get(0, torch.empty(0, dtype=torch.int64)), "rows of a table are picked by an index")
        walk.set_labels(call.result, {index.ndim: labels[1]} if 1 in labels else {})
        if 1 in labels:
            walk.produces(labels[1])
        return
    source, labels = call.tensors[0], walk.labels(call.tensors[0])
    if call.op.overloadpacket is aten.index_select:
        picked = {call["dim"] % source.ndim}
        kept = {dim: vector for dim, vector in labels.items() if dim not in picked}
    elif call.op.overloadpacket in (aten.index, aten._unsafe_index) and len(call.tensors) > 1:
        indices = list(call["indices"]) + [None] * (source.ndim - len(call["indices"]))
        used = [dim for dim, index in enumerate(indices) if index is not None]
        plain = all(indices[dim].dtype != torch.bool for dim in used) and used == list(range(used[0], used[-1] + 1))
        if not plain:  # boolean or scattered indices move dimensions about
            walk.protect_all(call.tensors, "picked by an index")
            return
        picked, shift = set(used), max(indices[dim].ndim for dim in used) - len(used)
        kept = {dim + shift * (dim > used[-1]): vector for dim, vector in labels.items() if dim not in picked}
    else:
        walk.protect_all(call.tensors, "picked by an index")
        return
    for dim in picked & labels.keys():
        walk.protect(labels[dim], "picked by an index")
    walk.set_labels(call.result, kept)
