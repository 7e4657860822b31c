"""Rules for normalisation layers: each channel has its own scale and shift; some take statistics over channels."""

from __future__ import annotations

from passdeploy.channels.groups import cuts_whole_groups
from passdeploy.tracing.op_call import OpCall
from passdeploy.tracing.rules.contractions import join_or_protect
from passdeploy.tracing.rules.registry import rule
from passdeploy.tracing.tracer import ChannelTracer


@rule("native_batch_norm", "batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "miopen_batch_norm")
@rule("_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_batch_norm_no_update")
@rule("_batch_norm_impl_index")
def batch_norm_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Join each channel with its running statistics, scale and shift."""
    x = call["input"]
    labels = dict(tracer.labels(x))
    tables = [call.arguments.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    vectors = [tracer.labels(table).get(0) for table in tables if table is not None]
    channels = labels.get(1)
    if call.arguments.get("training", "no_training" not in call.name) and not tracer.is_parameter(call.tensors[0]):
        for dim in labels.keys() - {1}:  # of a weight, `masked` takes them over the channels that are left
            tracer.protect(labels[dim], "a batch's statistics are taken over these channels")
    for vector in vectors:
        join_or_protect(tracer, channels, vector)
    tracer.set_labels(call.results[0], labels)


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Join each channel with its scale and shift; without a scale that is a parameter, protect the channels.

    A slim network takes the statistics over the remaining channels; `masked` does the same, and finds the norm by the
    name of its scale.
    """
    x, scale, shift = call["input"], call.arguments.get("weight"), call.arguments.get("bias")
    labels = dict(tracer.labels(x))
    first = x.ndim - len(call["normalized_shape"])
    for dim in range(first, x.ndim):
        if dim in labels and not tracer.is_state(scale):
            tracer.protect(labels[dim], "a statistic over these channels depends on their number")
        for table in (scale, shift):
            if table is not None:
                join_or_protect(tracer, labels.get(dim), tracer.labels(table).get(dim - first))
    tracer.set_labels(call.results[0], labels)


@rule("native_group_norm")
def group_norm_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Join the channels of a group, or those at the same index of every group; statistics are as in a layer norm."""
    x, scale, groups = call["input"], call["weight"], int(call["group"])
    labels = dict(tracer.labels(x))
    if (channels := labels.get(1)) is not None:
        reason = tracer.reason("normalised together with channels that must stay")
        rows = channels.view(groups, -1)
        if cuts_whole_groups(groups, rows.size(1)):
            tracer.union_find.join_rows(rows, reason)
        else:
            tracer.union_find.join_rows(rows.T, reason)
            if not tracer.is_state(scale):
                tracer.protect(channels, "a statistic over these channels depends on their number")
    for table in (scale, call["bias"]):
        if table is not None:
            join_or_protect(tracer, channels, tracer.labels(table).get(0))
    tracer.set_labels(call.results[0], labels)
