"""One rule per tensor operation: how the labels of its inputs become the labels of its results.

A rule may rely on three facts. Labels sit along dimensions, never on single elements. Whatever
two tensors do element by element joins their labels. A contraction (convolution, linear layer, matrix
product) ends the labels it sums over and starts those of its weight's output dimension.

An operation that is missing here is not an error: follow.py protects what touches it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from passdeploy.channels.follow import Call, DimLabels, Rule, Walk
from passdeploy.channels.labels import NONE

aten = torch.ops.aten
_RULES: dict[Any, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of `torch.ops.aten`, by name; names this torch lacks are passed over."""

    def register(function: Rule) -> Rule:
        for op in ops:
            if hasattr(aten, op):
                _RULES[getattr(aten, op)] = function
        return function

    return register


def find_rule(op: torch._ops.OpOverload) -> Rule | None:
    """The rule of an operation; torch itself marks the element-wise ones."""
    if (found := _RULES.get(op.overloadpacket)) is not None:
        return found
    if str(op.overloadpacket) in ("torchvision.roi_align", "torchvision.roi_pool"):
        return regions
    return elementwise if torch.Tag.pointwise in op.tags else None


# Element by element


@rule(
    "copy_",
    "hardswish",
    "hardswish_",
    "mish_",
    "gelu_",
    "log_sigmoid_forward",
    "_prelu_kernel",
    "native_dropout",
)
@rule(
    "masked_fill_",
    "rrelu_with_noise",
    "fill_",
    "zero_",
    "normal_",
    "uniform_",
    "bernoulli_",
    "feature_dropout",
)
def elementwise(walk: Walk, call: Call) -> None:
    """Whatever shares a position shares its fate."""
    operands = [(tensor.shape, walk.labels(tensor)) for tensor in call.tensors]
    for result in call.results:
        walk.set_labels(result, joined(walk, operands, result.ndim))


def joined(walk: Walk, operands: Sequence[tuple[Sequence[int], DimLabels]], ndim: int) -> DimLabels:
    """Join the labels of operands (shape, labels) that broadcast against each other into `ndim` dimensions."""
    meeting: dict[int, list[Tensor | None]] = {}
    for shape, labels in operands:
        for dim, size in enumerate(shape):
            if size > 1:  # a dimension of size one broadcasts: it meets nobody
                meeting.setdefault(ndim - len(shape) + dim, []).append(labels.get(dim))
    result: DimLabels = {}
    for dim, vectors in meeting.items():
        labelled = [vector for vector in vectors if vector is not None]
        if not labelled:
            continue
        for vector in labelled[1:]:
            walk.join(labelled[0], vector, "meets channels that must stay")
        if len(labelled) < len(vectors):
            walk.protect(labelled[0], "meets a tensor whose size cannot change")
        result[dim] = labelled[0]
    return result


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
@rule("clone", "detach", "alias", "_to_copy", "lift_fresh")
def same_shape(walk: Walk, call: Call) -> None:
    """A tensor made in the image of another has its channels."""
    walk.set_labels(call.results[0], dict(walk.labels(call.tensors[0])))


@rule("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided")
def unrelated(walk: Walk, call: Call) -> None:
    """A tensor that takes only its kind from another has none of its channels."""
    walk.set_labels(call.results[0], {})


@rule("as_strided_")
def restrided(walk: Walk, call: Call) -> None:
    """Other strides for the same shape, as pooling to one pixel does; anything else is not followed."""
    tensor = call["self"]
    labels = walk.labels(tensor)
    if any(dim >= tensor.ndim or tensor.size(dim) != len(vector) for dim, vector in labels.items()):
        walk.give_up(call, "given another shape in place")


@rule("glu")
def gated(walk: Walk, call: Call) -> None:
    """One half gates the other: both lose the same places."""
    source = call["self"]
    dim, labels = call["dim"] % source.ndim, dict(walk.labels(source))
    if (vector := labels.get(dim)) is not None:
        labels[dim] = walk.book.join_rows(vector.view(2, -1).T, walk.reason("gated by channels that must stay"))
    walk.set_labels(call.result, labels)


# Data movement


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
def movement(walk: Walk, call: Call) -> None:
    """Do to a tensor's labels what was done to the tensor."""
    source, labels = call.tensors[0], walk.labels(call.tensors[0])
    if call.op.overloadpacket in (aten.split, aten.unsafe_split):
        _keep_halves_equal(walk, call)
    found: list[DimLabels] = [{} for _ in call.results]
    for dim, vector in labels.items():
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


def _keep_halves_equal(walk: Walk, call: Call) -> None:
    """`chunk` and `split` into equal parts will do so again on the slim network: the parts lose the same places."""
    dim = call["dim"] % call.tensors[0].ndim
    vector, size = walk.labels(call.tensors[0]).get(dim), call["split_size"]
    if vector is not None and len(vector) > size:
        if len(vector) % size:
            walk.protect(vector, "split into parts of unequal size")
        else:
            walk.book.join_rows(vector.view(-1, size).T, walk.reason("at the place of channels that must stay"))


def _spread(vector: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels along one dimension as a field over the whole tensor, without using its memory."""
    ones = [1] * len(shape)
    ones[dim] = -1
    return vector.view(ones).expand(*shape)


def _moved(call: Call, field: Tensor) -> list[Tensor]:
    """The operation, run on labels in place of values."""
    arguments = dict(call.arguments)
    first = next(name for name, value in arguments.items() if isinstance(value, Tensor))
    arguments[first] = field
    if call.op.overloadpacket in (aten.view, aten._unsafe_view, aten._reshape_alias):
        return [field.reshape(call.results[0].shape)]  # a spread field has no strides to view
    result = call.op(**arguments)
    return [result] if isinstance(result, Tensor) else list(result)


@rule("constant_pad_nd")
def pad(walk: Walk, call: Call) -> None:
    """Along their dimension channels get neighbours that must stay; padding of space belongs to each channel."""
    ndim, amounts = call.result.ndim, list(call["pad"])
    labels = {}
    for dim, vector in walk.labels(call["self"]).items():
        before, after = [*amounts[2 * (ndim - 1 - dim) :], 0, 0][:2]
        cropped = vector[max(-before, 0) : len(vector) - max(-after, 0)]
        labels[dim] = torch.nn.functional.pad(cropped, (max(before, 0), max(after, 0)), value=NONE)
    walk.set_labels(call.result, labels)


@rule("cat", "concat")
def concatenate(walk: Walk, call: Call) -> None:
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
def stack(walk: Walk, call: Call) -> None:
    """Stacked tensors share every dimension but the new one."""
    joint = call["dim"] % call.result.ndim
    operands = [(tensor.shape, walk.labels(tensor)) for tensor in call["tensors"]]
    labels = joined(walk, operands, call.result.ndim - 1)
    walk.set_labels(call.result, {dim + (dim >= joint): vector for dim, vector in labels.items()})


@rule("index", "index_select", "gather", "embedding", "take", "masked_select", "_unsafe_index")
def picking(walk: Walk, call: Call) -> None:
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


# Reductions


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "prod",
    "std",
    "var",
    "var_mean",
    "std_mean",
    "max",
    "min",
    "argmax",
    "argmin",
)
@rule("any", "all", "norm", "linalg_vector_norm", "logsumexp", "median", "cumsum", "sort", "topk", "aminmax")
@rule("_softmax", "_safe_softmax", "_log_softmax", "softmax", "log_softmax", "nansum", "count_nonzero", "cumprod")
def reduction(walk: Walk, call: Call) -> None:
    """A statistic over channels changes with their number: `masked` takes it of those that are left, or they stay."""
    source = call.tensors[0]
    labels = walk.labels(source)
    if len(call.tensors) > 1:  # max(a, b) and min(a, b)
        return elementwise(walk, call)
    dims = call.arguments.get("dim")
    over = {d % source.ndim for d in ([dims] if isinstance(dims, int) else dims or range(source.ndim))}
    for dim in sorted(over & labels.keys()):
        if call.op.overloadpacket not in _RESTRICTABLE or not walk.restrict(dim - source.ndim, labels[dim]):
            walk.protect(labels[dim], "a statistic over these channels depends on their number")
    for result in call.results:
        if result.ndim == source.ndim:
            kept = {d: v for d, v in labels.items() if result.size(d) == len(v)}
        else:
            kept = {d - sum(o < d for o in over): v for d, v in labels.items() if d not in over}
        walk.set_labels(result, kept)
    return None


# Windows over space: the channels in front of them pass

_SPATIAL_DIMS = {  # how many of a tensor's last dimensions are space
    name: dims
    for dims, names in {
        1: "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool1d_with_indices "
        "reflection_pad1d replication_pad1d upsample_nearest1d upsample_linear1d "
        "_upsample_nearest_exact1d ",
        2: "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d max_pool2d "
        "fractional_max_pool2d reflection_pad2d replication_pad2d upsample_nearest2d upsample_bilinear2d "
        "upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
        "adaptive_avg_pool2d mkldnn_max_pool2d grid_sampler_2d ",
        3: "upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact3d max_pool3d_with_indices "
        "avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d reflection_pad3d replication_pad3d ",
    }.items()
    for name in names.split()
}


@rule(*_SPATIAL_DIMS)
def window(walk: Walk, call: Call) -> None:
    """Pooling, resizing and mirrored padding move along space; channels in front of it pass."""
    source = call.tensors[0]
    space = source.ndim - _SPATIAL_DIMS[call.name.removeprefix("aten.")]
    for dim, vector in walk.labels(source).items():
        if dim >= space:
            walk.protect(vector, "a window slides along these channels")
    for result in call.results:
        walk.set_labels(result, {d: v for d, v in walk.labels(source).items() if d < space})


def regions(walk: Walk, call: Call) -> None:
    """Regions of a map, each resampled: its channels pass."""
    labels = walk.labels(call["input"])
    for dim, vector in labels.items():
        if dim != 1:
            walk.protect(vector, "regions are taken along these channels")
    walk.set_labels(call.results[0], {1: labels[1]} if 1 in labels else {})


# Contractions


def cuts_whole_groups(groups: int, inputs_per_group: int) -> bool:
    """Whether a grouped convolution loses whole groups (depthwise always) or the same places in every group.

    The finer of the two choices leaves the hypernetwork more to decide.
    """
    return groups > 1 and groups >= inputs_per_group


@rule("convolution", "_convolution", "convolution_overrideable", "cudnn_convolution", "mkldnn_convolution")
def convolution(walk: Walk, call: Call) -> None:
    """Input labels name the weight's input slices, the weight's output slices name the result's channels."""
    x, weight, bias, groups = call["input"], call["weight"], call.arguments.get("bias"), int(call["groups"])
    transposed = bool(call.arguments.get("transposed", False))
    channel = 1 if x.ndim == weight.ndim else 0
    labels, slices = walk.labels(x), walk.labels(weight)
    inputs, outputs = x.size(channel), call.result.size(channel)
    into, out_of = (slices.get(0), slices.get(1)) if transposed else (slices.get(1), slices.get(0))
    for dim, vector in labels.items():
        if dim > channel:
            walk.protect(vector, "a window slides along these channels")
    for dim, vector in slices.items():
        if dim > 1:
            walk.protect(vector, "a place in a kernel")

    coming = labels.get(channel)
    made: Tensor | None
    scales: tuple[Tensor | None, ...]
    if groups == 1:
        end(walk, coming, into)
        made, scales = out_of, (out_of, into)
    elif cuts_whole_groups(groups, inputs // groups):
        made, scales = _whole_groups(walk, coming, slices.get(0), groups, inputs, outputs, transposed)
        if (within := slices.get(1)) is not None:
            walk.protect(within, "whole groups are removed, their inside stays")
    else:
        made, scales = _same_places(walk, coming, into, out_of, groups, transposed)
    if made is not None:
        walk.produces(made)
        if bias is not None:
            walk.join(made, walk.labels(bias).get(0, torch.full((outputs,), NONE)), "meets a fixed bias")
    per_weight = (x if transposed else call.result).numel() // (inputs if transposed else outputs)
    walk.count(per_weight * weight.numel(), *scales)
    kept = {dim: vector for dim, vector in labels.items() if dim < channel}
    walk.set_labels(call.result, kept | ({channel: made} if made is not None else {}))


def end(walk: Walk, coming: Tensor | None, into: Tensor | None) -> None:
    """Channels arrive at the weight slices that read them; a side that is missing makes the other stay."""
    if into is not None:
        walk.reads(into)
    meet(walk, coming, into)


def meet(walk: Walk, channels: Tensor | None, table: Tensor | None) -> None:
    """Channels meet the slices of a parameter that belong to them; a side that is missing makes the other stay."""
    if channels is not None and table is not None:
        walk.join(channels, table, "meets channels that must stay")
    elif channels is not None:
        walk.protect(channels, "meets a weight that cannot be cut")
    elif table is not None:
        walk.protect(table, "belongs to an input that cannot be cut")


def _whole_groups(
    walk: Walk,
    coming: Tensor | None,
    rows: Tensor | None,
    groups: int,
    inputs: int,
    outputs: int,
    transposed: bool,
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """A group goes with all it reads and all it makes. Returns the result's labels and what its cost grows with."""
    if rows is None:
        end(walk, coming, None)
        return None, ()
    reason = walk.reason("in one group with channels that must stay")
    unit = walk.book.join_rows(rows.view(groups, -1), reason)
    if coming is None:
        walk.protect(unit, "reads an input that cannot be cut")
    else:
        read = walk.book.join_rows(coming.view(groups, inputs // groups), reason)
        walk.join(unit, read, "in one group with channels that must stay")
    made = unit.repeat_interleave(outputs // groups) if transposed else rows
    return made, (rows,)


def _same_places(
    walk: Walk,
    coming: Tensor | None,
    into: Tensor | None,
    out_of: Tensor | None,
    groups: int,
    transposed: bool,
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """Every group loses the same places. Returns the result's labels and what its cost grows with."""
    reason = walk.reason("at the place of channels that must stay in another group")
    # The weight spells out all groups along its dimension 0 and one group along dimension 1.
    spelled, single = (coming, out_of) if transposed else (out_of, into)
    if transposed:
        end(walk, coming, into)
        if into is not None:
            walk.book.join_rows(into.view(groups, -1).T, reason)
        return (None if single is None else single.repeat(groups)), (into, out_of)
    if coming is not None:
        read = walk.book.join_rows(coming.view(groups, -1).T, reason)
        end(walk, read, into)
    else:
        end(walk, None, into)
    if spelled is not None:
        walk.book.join_rows(spelled.view(groups, -1).T, reason)
    return spelled, (out_of, into)


@rule("mm", "addmm", "bmm", "baddbmm")
def product(walk: Walk, call: Call) -> None:
    """A matrix product ends what it sums over; rows and columns pass, a batch of matrices is joined."""
    *added, left, right = call.tensors
    row, column = left.ndim - 2, left.ndim - 1
    ours, theirs = walk.labels(left), walk.labels(right)
    end(walk, ours.get(column), theirs.get(row))
    result: DimLabels = {}
    if row in ours:
        result[row] = ours[row]
    if column in theirs:
        result[column] = theirs[column]
        walk.produces(theirs[column])
    if left.ndim == 3:
        meet(walk, ours.get(0), theirs.get(0))
        if 0 in ours or 0 in theirs:
            result[0] = ours[0] if 0 in ours else theirs[0]
    walk.count(call.result.numel() * left.size(column), *result.values(), ours.get(column, theirs.get(row)))
    operands = [(call.result.shape, result), *((tensor.shape, walk.labels(tensor)) for tensor in added)]
    walk.set_labels(call.result, joined(walk, operands, call.result.ndim))


# Normalisation


@rule("native_batch_norm", "batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "miopen_batch_norm")
@rule(
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "_batch_norm_impl_index",
)
def batch_norm(walk: Walk, call: Call) -> None:
    """Each channel has its own statistics, scale and shift."""
    x = call["input"]
    labels = dict(walk.labels(x))
    tables = [call.arguments.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    vectors = [walk.labels(table).get(0) for table in tables if table is not None]
    channels = labels.get(1)
    for vector in vectors:
        meet(walk, channels, vector)
    walk.set_labels(call.results[0], labels)


_RESTRICTABLE = {aten.mean, aten.sum, aten.amax, aten.linalg_vector_norm, aten._softmax}


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(walk: Walk, call: Call) -> None:
    """Statistics over channels: those that are left make their own, which `masked` knows by the scale's name."""
    x, scale, shift = call["input"], call.arguments.get("weight"), call.arguments.get("bias")
    labels = dict(walk.labels(x))
    first = x.ndim - len(call["normalized_shape"])
    for dim in range(first, x.ndim):
        if dim in labels and not walk.is_state(scale):
            walk.protect(labels[dim], "a statistic over these channels depends on their number")
        for table in (scale, shift):
            if table is not None:
                meet(walk, labels.get(dim), walk.labels(table).get(dim - first))
    walk.set_labels(call.results[0], labels)


@rule("native_group_norm")
def group_norm(walk: Walk, call: Call) -> None:
    """Whole groups go, or the same places in every group; statistics as in a layer norm."""
    x, scale, groups = call["input"], call["weight"], int(call["group"])
    labels = dict(walk.labels(x))
    if (channels := labels.get(1)) is not None:
        reason = walk.reason("normalised together with channels that must stay")
        rows = channels.view(groups, -1)
        if cuts_whole_groups(groups, rows.size(1)):
            walk.book.join_rows(rows, reason)
        else:
            walk.book.join_rows(rows.T, reason)
            if not walk.is_state(scale):
                walk.protect(channels, "a statistic over these channels depends on their number")
    for table in (scale, call["bias"]):
        if table is not None:
            meet(walk, channels, walk.labels(table).get(0))
    walk.set_labels(call.results[0], labels)


# Attention


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
@rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
@rule("_scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_attention")
def attention(walk: Walk, call: Call) -> None:
    """Heads are joined over queries, keys and values; the width of a value passes, that of a query is summed over."""
    query, key, value = call["query"], call["key"], call["value"]
    width, place = query.ndim - 1, query.ndim - 2
    ours, keys, values = (walk.labels(tensor) for tensor in (query, key, value))
    mask = call.arguments.get("attn_mask", call.arguments.get("attn_bias"))
    sides = [(tensor.shape[:place], {d: v for d, v in walk.labels(tensor).items() if d < place})
             for tensor in (query, key, value)]  # fmt: skip
    if mask is not None and mask.ndim > 2:
        sides.append((mask.shape[:-2], {d: v for d, v in walk.labels(mask).items() if d < mask.ndim - 2}))
    result = joined(walk, sides, place)
    end(walk, ours.get(width), keys.get(width))
    if call.arguments.get("scale") is None and width in ours:
        walk.protect(ours[width], "the scale of attention depends on this width")
    for labels in (ours, keys, values):
        if place in labels:
            walk.protect(labels[place], "attention runs along these channels")
    scores = query[..., 0].numel() * key.size(place)
    heads = list(result.values())
    walk.count(scores * query.size(width), *heads, ours.get(width))
    walk.count(scores * value.size(width), *heads, values.get(width))
    if width in values:
        result[width] = values[width]
    walk.set_labels(call.results[0], result)


# Recurrent networks


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(walk: Walk, call: Call) -> None:
    """The states that a recurrent network starts from have the channels that its weights read states by.

    One number states the width of all of them: every layer and direction loses the same places.
    """
    weights = call["params"]
    of_one = 4 if call["has_biases"] else 2  # parameters of one layer and direction: the second reads the state
    readers = [walk.labels(weight).get(1) for weight in weights[1::of_one]]
    known = [vector for vector in readers if vector is not None]
    sizes = {len(vector) for vector in known} | {state.size(-1) for state in call.results}
    if len(known) < len(readers) or len(sizes) > 1:
        walk.give_up(call, "a recurrent network with projections, or of a single channel")
        return
    for vector in known[1:]:
        walk.join(known[0], vector, "meets channels that must stay")
    for state in call.results:
        last = state.ndim - 1
        if (given := walk.labels(state).get(last)) is not None:
            walk.join(known[0], given, "meets channels that must stay")
        walk.set_labels(state, {**walk.labels(state), last: known[0]})
