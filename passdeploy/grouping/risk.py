"""Assess from the operations of a trace what must be checked before a network may be cut.

Labels show which channels belong together, but not where the code takes the sizes from that it states. So each
operation on channels is safe, or the cut network must be run, or its outputs must be compared as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
from torch import Tensor, nn

from passdeploy.tracing.trace import OpRecord, Trace


class RequiredCheck(IntEnum):
    """The check that a network needs before it may be cut by its labels; a higher one includes the lower ones."""

    NONE = 0
    SIZES = 1  # a stated size may be stale: the cut network must be run
    VALUES = 2  # channels may be mixed up: the outputs must be compared with those of the masked network


# Safe operations: they hand channels on one to one, or contract them with a weight.
_CONTRACTIONS = {"aten.addmm", "aten.mm"}
_PER_CHANNEL = {
    *("aten.native_batch_norm", "aten._native_batch_norm_legit_no_training", "aten.cudnn_batch_norm"),
    *("aten.t", "aten.permute", "aten.transpose", "aten.squeeze", "aten.unsqueeze"),
    *("aten.cat", "aten.mean", "aten.clone", "aten.detach", "aten.alias", "aten.native_dropout"),
    *("aten.max_pool2d_with_indices", "aten.avg_pool2d", "aten._adaptive_avg_pool2d"),
    *("aten.upsample_nearest2d", "aten.upsample_bilinear2d", "aten.reflection_pad2d"),
}
_SAFE_POINTWISE = {
    f"aten.{name}{ending}"
    for name in (
        *("relu", "hardtanh", "hardswish", "hardsigmoid", "silu", "sigmoid"),
        *("gelu", "tanh", "leaky_relu", "elu"),
    )
    for ending in ("", "_")
}
# Pointwise with scalars, and a scalar may be a number of channels.
_SCALAR_ARITHMETIC = {
    f"aten.{name}{ending}" for name in ("add", "sub", "mul", "div", "pow", "clamp", "clamp_min") for ending in ("", "_")
}
_DIVISIONS = {"aten.div", "aten.div_"}
_LAYER_NORMS = {"aten.native_layer_norm", "aten.rms_norm"}

# Operations whose sizes or indices the model's code may state.
_WITH_STATED_SIZES = {
    *("aten.view", "aten._unsafe_view", "aten._reshape_alias", "aten.slice", "aten.narrow", "aten.split"),
    *("aten.split_with_sizes", "aten.unbind", "aten.select", "aten.expand", "aten.repeat", "aten.unfold"),
    *("aten.as_strided", "aten.as_strided_", "aten.index", "aten.index_put_", "aten.roll", "aten.constant_pad_nd"),
    *("aten.new_zeros", "aten.pixel_shuffle", "aten.pixel_unshuffle"),
}

# Those of them that pick a part of a dimension.
_PICKING = {
    *("aten.slice", "aten.narrow", "aten.split", "aten.split_with_sizes", "aten.unbind", "aten.select"),
    *("aten.as_strided", "aten.as_strided_", "aten.index"),
}

_VIEWS = {"aten.view", "aten._unsafe_view", "aten._reshape_alias"}
# Those of them that state the size of every dimension, also of one that they hand on.
_WITH_FULL_SHAPE = {
    *("aten.view", "aten._unsafe_view", "aten._reshape_alias", "aten.expand", "aten.as_strided", "aten.as_strided_"),
    *("aten.new_zeros", "aten.slice", "aten.split_with_sizes", "aten.unfold"),
}


def required_check(trace: Trace, class_of: Callable[[str], type[nn.Module]]) -> RequiredCheck:
    """Return the strictest check that an operation on channels requires.

    Args:
        trace: of the network.
        class_of: name of a module -> its class.
    """

    def is_run_by_torch(record: OpRecord) -> bool:
        # not by a subclass of someone else, whose own code may state widths
        code = class_of(record.modules[-1]).__module__ if record.modules else ""
        return code.startswith(("torch.nn.", "torchvision."))

    def check_of(record: OpRecord) -> RequiredCheck:
        op = record.op
        if _meets_fixed_tensor(record, trace):
            return RequiredCheck.VALUES
        if op in _DIVISIONS and len(record.inputs) > 1:  # by what a mask may set to zero
            return RequiredCheck.VALUES
        if record.has_computed_weight:  # what the mask sets to zero need not make it zero
            return RequiredCheck.VALUES
        if op in _PER_CHANNEL or op in _SAFE_POINTWISE or op in _CONTRACTIONS:
            return RequiredCheck.NONE
        if op == "aten.convolution" and 0 not in record.inputs[1][1] and record.inputs[1][0][0] > 1:
            return RequiredCheck.VALUES  # kernels that are no parameter: each may be another
        if op == "aten.convolution":  # modules other than torch's state the number of groups themselves
            return RequiredCheck.NONE if is_run_by_torch(record) else RequiredCheck.SIZES
        if op in _LAYER_NORMS:
            return RequiredCheck.NONE if is_run_by_torch(record) else RequiredCheck.SIZES
        if op in _SCALAR_ARITHMETIC and not record.has_constants:
            return RequiredCheck.SIZES if set(record.scalars) - {1} else RequiredCheck.NONE
        if op in _WITH_STATED_SIZES and (record.has_derived_sizes or _hands_on(record)):
            states_all = op in _WITH_FULL_SHAPE and not record.has_derived_sizes
            return RequiredCheck.SIZES if states_all else RequiredCheck.NONE
        return RequiredCheck.VALUES

    on_channels = (record for record in trace.op_log if any(labels for _, labels in record.inputs))
    return max(map(check_of, on_channels), default=RequiredCheck.NONE)


def states_sizes(trace: Trace) -> bool:
    """True if an operation splits, merges or selects channels by sizes or indices that the code states."""
    return any(
        record.op in _WITH_STATED_SIZES and not record.has_derived_sizes and not _hands_on(record)
        for record in trace.op_log
    )


def picks_channels(trace: Trace) -> bool:
    """True if an operation picks channels by their place, which the code may state."""
    return any(record.op in _PICKING and not _hands_on(record) for record in trace.op_log)


def _meets_fixed_tensor(record: OpRecord, trace: Trace) -> bool:
    """True if channels of weights meet those of a plain tensor, or of the output of a module without weights."""
    if trace.union_find.size <= trace.fixed_from:
        return False
    known = [bool((vector >= trace.fixed_from).any()) for _, labels in record.inputs for vector in labels.values()]
    return any(known) and not all(known)


def _hands_on(record: OpRecord) -> bool:
    """True if every dimension with channels comes out as it went in, whatever the other sizes are."""
    return all(
        _is_handed_on(shape, dim, vector, record) for shape, labels in record.inputs for dim, vector in labels.items()
    )


def _is_handed_on(shape: Sequence[int], dim: int, vector: Tensor, record: OpRecord) -> bool:
    is_view = record.op in _VIEWS
    return any(
        (vector is other or torch.equal(vector, other)) and (not is_view or keeps_order(shape, dim, new_shape, new_dim))
        for new_shape, labels in record.results
        for new_dim, other in labels.items()
    )


def keeps_order(shape: Sequence[int], dim: int, new_shape: Sequence[int], new_dim: int) -> bool:
    """True if a view leaves the dimensions before the channels alone, or those after them, or adds some of size one.

    Otherwise a dimension of size one has moved from one side to the other. With a batch of two, the view would mix
    channels with samples.
    """
    before, new_before = tuple(shape[:dim]), tuple(new_shape[:new_dim])
    after, new_after = tuple(shape[dim + 1 :]), tuple(new_shape[new_dim + 1 :])
    adds_ones = _differ_by_ones(before, new_before) and _differ_by_ones(after, new_after)
    return before == new_before or after == new_after or adds_ones


def _differ_by_ones(shape: Sequence[int], new_shape: Sequence[int]) -> bool:
    """True if `new_shape` has all sizes of `shape` in their order, and ones between them."""
    left = list(shape)
    for size in new_shape:
        if left and left[0] == size:
            left.pop(0)
        elif size != 1:
            return False
    return not left
