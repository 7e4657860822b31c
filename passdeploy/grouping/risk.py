"""What a walk can be trusted in, and what has to be tried.

Labels say which channels stand or fall together; where the code takes the sizes from that it spells out, they do not
say. So every operation that channels pass through leaves some doubt, or none.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor, nn

from passdeploy.tracing.trace import OpRecord, Trace


class RequiredCheck(IntEnum):
    """What may go wrong when a network is cut by its labels."""

    NONE = 0
    SIZES = 1  # a number may be stale: the network must be run
    VALUES = 2  # channels may end up in other places: it must be compared


# The following pass channels on, or end and start them in a weight, in one way only.
_CONTRACTIONS = {"aten.addmm", "aten.mm"}
_PER_CHANNEL = {
    *("aten.native_batch_norm", "aten._native_batch_norm_legit_no_training", "aten.cudnn_batch_norm"),
    *("aten.t", "aten.permute", "aten.transpose", "aten.squeeze", "aten.unsqueeze"),
    *("aten.cat", "aten.mean", "aten.clone", "aten.detach", "aten.alias", "aten.native_dropout"),
    *("aten.max_pool2d_with_indices", "aten.avg_pool2d", "aten._adaptive_avg_pool2d"),
    *("aten.upsample_nearest2d", "aten.upsample_bilinear2d", "aten.reflection_pad2d"),
}
_ELEMENT_BY_ELEMENT = {
    *("aten.relu", "aten.relu_", "aten.hardtanh", "aten.hardtanh_", "aten.hardswish", "aten.hardswish_"),
    *("aten.hardsigmoid", "aten.hardsigmoid_", "aten.silu", "aten.silu_", "aten.sigmoid", "aten.sigmoid_"),
    *("aten.gelu", "aten.tanh", "aten.leaky_relu", "aten.leaky_relu_", "aten.elu", "aten.elu_"),
}
# The same, but they take numbers, and a number may count channels.
_ARITHMETIC = {
    f"aten.{name}{ending}" for name in ("add", "sub", "mul", "div", "pow", "clamp", "clamp_min") for ending in ("", "_")
}
_NORMS = {"aten.native_layer_norm", "aten.rms_norm"}

# What states a size that nobody but the model's code knows, if it does not hand a dimension on as it is.
_SIZED = {
    *("aten.view", "aten._unsafe_view", "aten._reshape_alias", "aten.slice", "aten.narrow", "aten.split"),
    *("aten.split_with_sizes", "aten.unbind", "aten.select", "aten.expand", "aten.repeat", "aten.unfold"),
    *("aten.as_strided", "aten.as_strided_", "aten.index", "aten.index_put_", "aten.roll", "aten.constant_pad_nd"),
    *("aten.new_zeros", "aten.pixel_shuffle", "aten.pixel_unshuffle"),
}

_STATING_EVERY_SIZE = {
    *("aten.view", "aten._unsafe_view", "aten._reshape_alias", "aten.expand", "aten.as_strided", "aten.as_strided_"),
    "aten.new_zeros",
}


def required_check(trace: Trace, class_of: Callable[[str], type[nn.Module]]) -> RequiredCheck:
    """The gravest doubt about a network.

    Args:
        trace: of its walk.
        class_of: the class of a module of that name.
    """

    def is_run_by(record: OpRecord, kinds: type | tuple[type, ...]) -> bool:
        return bool(record.modules) and issubclass(class_of(record.modules[-1]), kinds)

    def about(record: OpRecord) -> RequiredCheck:
        op = record.op
        if op in _PER_CHANNEL or op in _ELEMENT_BY_ELEMENT or op in _CONTRACTIONS:
            return RequiredCheck.NONE
        if op == "aten.convolution":  # the groups of other modules than torch's own are a number
            return RequiredCheck.NONE if is_run_by(record, nn.modules.conv._ConvNd) else RequiredCheck.SIZES
        if op in _NORMS:
            return RequiredCheck.NONE if is_run_by(record, (nn.LayerNorm, nn.RMSNorm)) else RequiredCheck.SIZES
        if op in _ARITHMETIC and not record.has_constants:
            return RequiredCheck.SIZES if set(record.scalars) - {1} else RequiredCheck.NONE
        if op in _SIZED and (record.has_derived_sizes or _hands_on(record)):
            # It may still have been told how many channels it hands on.
            states_all = op in _STATING_EVERY_SIZE and not record.has_derived_sizes
            return RequiredCheck.SIZES if states_all else RequiredCheck.NONE
        return RequiredCheck.VALUES

    graves = (about(one) for one in trace.op_log if any(labels for _, labels in one.inputs))
    return max(graves, default=RequiredCheck.NONE)


def states_sizes(trace: Trace) -> bool:
    """Whether a dimension with channels is taken apart, put together or picked from by numbers anywhere."""
    return any(one.op in _SIZED and not one.has_derived_sizes and not _hands_on(one) for one in trace.op_log)


def _hands_on(record: OpRecord) -> bool:
    """Whether every dimension with channels comes out as it went in."""
    return all(_is_handed_on(vector, record) for _, labels in record.inputs for vector in labels.values())


def _is_handed_on(vector: Tensor, record: OpRecord) -> bool:
    return any(
        vector is other or torch.equal(vector, other) for _, labels in record.results for other in labels.values()
    )
