"""Convolutions and matrix products: they end the labels they sum over, and start those of their weight."""

from __future__ import annotations

import torch
from torch import Tensor

from passdeploy.channels.groups import cuts_whole_groups
from passdeploy.tracing.labels import NONE
from passdeploy.tracing.op_call import OpCall
from passdeploy.tracing.rules.elementwise import join_operands
from passdeploy.tracing.rules.registry import rule
from passdeploy.tracing.trace import DimLabels
from passdeploy.tracing.tracer import ChannelTracer


@rule("convolution", "_convolution", "convolution_overrideable", "cudnn_convolution", "mkldnn_convolution")
def convolution_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Input labels name the weight's input slices, the weight's output slices name the result's channels."""
    x, weight, bias, groups = call["input"], call["weight"], call.arguments.get("bias"), int(call["groups"])
    transposed = bool(call.arguments.get("transposed", False))
    channel = 1 if x.ndim == weight.ndim else 0
    labels, slices = tracer.labels(x), tracer.labels(weight)
    inputs, outputs = x.size(channel), call.result.size(channel)
    into, out_of = (slices.get(0), slices.get(1)) if transposed else (slices.get(1), slices.get(0))
    for dim, vector in labels.items():
        if dim > channel:
            tracer.protect(vector, "a window slides along these channels")
    for dim, vector in slices.items():
        if dim > 1:
            tracer.protect(vector, "a place in a kernel")

    coming = labels.get(channel)
    made: Tensor | None
    scales: tuple[Tensor | None, ...]
    if groups == 1:
        contract(tracer, coming, into)
        made, scales = out_of, (out_of, into)
    elif cuts_whole_groups(groups, inputs // groups):
        made, scales = _whole_groups(tracer, coming, slices.get(0), groups, inputs, outputs, transposed)
        if (within := slices.get(1)) is not None:
            tracer.protect(within, "whole groups are removed, their inside stays")
    else:
        made, scales = _same_indices(tracer, coming, into, out_of, groups, transposed)
    if made is not None:
        tracer.record_outputs(made)
        if bias is not None:
            tracer.join(made, tracer.labels(bias).get(0, torch.full((outputs,), NONE)), "meets a fixed bias")
    per_weight = (x if transposed else call.result).numel() // (inputs if transposed else outputs)
    tracer.record_macs(per_weight * weight.numel(), *scales)
    kept = {dim: vector for dim, vector in labels.items() if dim < channel}
    tracer.set_labels(call.result, kept | ({channel: made} if made is not None else {}))


def contract(tracer: ChannelTracer, coming: Tensor | None, into: Tensor | None) -> None:
    """Channels arrive at the weight slices that read them; a side that is missing makes the other stay."""
    if into is not None:
        tracer.record_reads(into)
    join_or_protect(tracer, coming, into)


def join_or_protect(tracer: ChannelTracer, channels: Tensor | None, table: Tensor | None) -> None:
    """Channels meet the slices of a parameter that belong to them; a side that is missing makes the other stay."""
    if channels is not None and table is not None:
        tracer.join(channels, table, "meets channels that must stay")
    elif channels is not None:
        tracer.protect(channels, "meets a weight that cannot be cut")
    elif table is not None:
        tracer.protect(table, "belongs to an input that cannot be cut")


def _whole_groups(
    tracer: ChannelTracer,
    coming: Tensor | None,
    rows: Tensor | None,
    groups: int,
    inputs: int,
    outputs: int,
    transposed: bool,
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """A group goes with all it reads and all it makes. Returns the result's labels and what its cost grows with."""
    if rows is None:
        contract(tracer, coming, None)
        return None, ()
    reason = tracer.reason("in one group with channels that must stay")
    unit = tracer.union_find.join_rows(rows.view(groups, -1), reason)
    if coming is None:
        tracer.protect(unit, "reads an input that cannot be cut")
    else:
        read = tracer.union_find.join_rows(coming.view(groups, inputs // groups), reason)
        tracer.join(unit, read, "in one group with channels that must stay")
    made = unit.repeat_interleave(outputs // groups) if transposed else rows
    return made, (rows,)


def _same_indices(
    tracer: ChannelTracer,
    coming: Tensor | None,
    into: Tensor | None,
    out_of: Tensor | None,
    groups: int,
    transposed: bool,
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """Every group loses the same places. Returns the result's labels and what its cost grows with."""
    reason = tracer.reason("at the place of channels that must stay in another group")
    # The weight spells out all groups along its dimension 0 and one group along dimension 1.
    spelled, single = (coming, out_of) if transposed else (out_of, into)
    if transposed:
        contract(tracer, coming, into)
        if into is not None:
            tracer.union_find.join_rows(into.view(groups, -1).T, reason)
        return (None if single is None else single.repeat(groups)), (into, out_of)
    if coming is not None:
        read = tracer.union_find.join_rows(coming.view(groups, -1).T, reason)
        contract(tracer, read, into)
    else:
        contract(tracer, None, into)
    if spelled is not None:
        tracer.union_find.join_rows(spelled.view(groups, -1).T, reason)
    return spelled, (out_of, into)


@rule("mm", "addmm", "bmm", "baddbmm")
def matmul_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """A matrix product ends what it sums over; rows and columns pass, a batch of matrices is joined."""
    *added, left, right = call.tensors
    row, column = left.ndim - 2, left.ndim - 1
    ours, theirs = tracer.labels(left), tracer.labels(right)
    contract(tracer, ours.get(column), theirs.get(row))
    result: DimLabels = {}
    if row in ours:
        result[row] = ours[row]
    if column in theirs:
        result[column] = theirs[column]
        tracer.record_outputs(theirs[column])
    if left.ndim == 3:
        join_or_protect(tracer, ours.get(0), theirs.get(0))
        if 0 in ours or 0 in theirs:
            result[0] = ours[0] if 0 in ours else theirs[0]
    tracer.record_macs(call.result.numel() * left.size(column), *result.values(), ours.get(column, theirs.get(row)))
    operands = [(call.result.shape, result), *((tensor.shape, tracer.labels(tensor)) for tensor in added)]
    tracer.set_labels(call.result, join_operands(tracer, operands, call.result.ndim))
