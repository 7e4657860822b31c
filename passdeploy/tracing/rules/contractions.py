"""Rules for convolutions and matrix products, which sum over input channels and produce those of their weight."""

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
    """Join input channels with the weight's input slices; the weight's output slices label the result's channels."""
    is_transposed = bool(call.arguments.get("transposed", False))
    convolve(tracer, call, call.arguments.get("bias"), int(call["groups"]), transposed=is_transposed)


def convolve(
    tracer: ChannelTracer, call: OpCall, bias: Tensor | None, groups: int, *, transposed: bool = False
) -> None:
    """Label the result of a convolution of `input` with `weight`, and record its cost."""
    x, weight = call["input"], call["weight"]
    channel_dim = 1 if x.ndim == weight.ndim else 0
    labels, slices = tracer.labels(x), tracer.labels(weight)
    inputs, outputs = x.size(channel_dim), call.result.size(channel_dim)
    input_slices, output_slices = (slices.get(0), slices.get(1)) if transposed else (slices.get(1), slices.get(0))
    for dim, vector in labels.items():
        if dim > channel_dim:
            tracer.protect(vector, "a window slides along these channels")
    for dim, vector in slices.items():
        if dim > 1:
            tracer.protect(vector, "a place in a kernel")

    input_labels = labels.get(channel_dim)
    output_labels: Tensor | None
    cost_dims: tuple[Tensor | None, ...]
    if groups == 1:
        contract(tracer, input_labels, input_slices)
        output_labels, cost_dims = output_slices, (output_slices, input_slices)
    elif cuts_whole_groups(groups, inputs // groups):
        output_labels, cost_dims = _whole_groups(
            tracer, input_labels, slices.get(0), groups, inputs, outputs, transposed
        )
        if (within := slices.get(1)) is not None:
            tracer.protect(within, "whole groups are removed, their inside stays")
    else:
        output_labels, cost_dims = _same_indices(tracer, input_labels, input_slices, output_slices, groups, transposed)
    if output_labels is not None:
        tracer.record_outputs(output_labels)
        if bias is not None:
            tracer.join(output_labels, tracer.labels(bias).get(0, torch.full((outputs,), NONE)), "meets a fixed bias")
    uses_per_weight = (x if transposed else call.result).numel() // (inputs if transposed else outputs)
    tracer.record_macs(uses_per_weight * weight.numel(), *cost_dims)
    kept = {dim: vector for dim, vector in labels.items() if dim < channel_dim}
    tracer.set_labels(call.result, kept | ({channel_dim: output_labels} if output_labels is not None else {}))


def contract(tracer: ChannelTracer, input_labels: Tensor | None, input_slices: Tensor | None) -> None:
    """Join input channels with the weight slices that read them, and record these; see `join_or_protect`."""
    if input_slices is not None:
        tracer.record_reads(input_slices)
    join_or_protect(tracer, input_labels, input_slices)


def join_or_protect(tracer: ChannelTracer, channels: Tensor | None, parameter_labels: Tensor | None) -> None:
    """Join channels with the slices of their parameter; where either has no labels, protect the other."""
    if channels is not None and parameter_labels is not None:
        tracer.join(channels, parameter_labels, "meets channels that must stay")
    elif channels is not None:
        tracer.protect(channels, "meets a weight that cannot be cut")
    elif parameter_labels is not None:
        tracer.protect(parameter_labels, "belongs to an input that cannot be cut")


def _whole_groups(
    tracer: ChannelTracer,
    input_labels: Tensor | None,
    rows: Tensor | None,
    groups: int,
    inputs: int,
    outputs: int,
    transposed: bool,
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """Join each group's input channels, weights and output channels, so that groups are removed whole.

    Returns:
        The labels of the result's channels, and those of the dimensions that the operation's cost is proportional to.
    """
    if rows is None and input_labels is not None and groups == inputs:
        # Kernels that the code repeats for as many channels as there are, as for a blur; trials compare the outputs.
        return input_labels.repeat_interleave(outputs // groups), (input_labels,)
    if rows is None:
        contract(tracer, input_labels, None)
        return None, ()
    reason = tracer.reason("in one group with channels that must stay")
    group_labels = tracer.union_find.join_rows(rows.view(groups, -1), reason)
    if input_labels is None:
        tracer.protect(group_labels, "reads an input that cannot be cut")
    else:
        read = tracer.union_find.join_rows(input_labels.view(groups, inputs // groups), reason)
        tracer.join(group_labels, read, "in one group with channels that must stay")
    output_labels = group_labels.repeat_interleave(outputs // groups) if transposed else rows
    return output_labels, (rows,)


def _same_indices(
    tracer: ChannelTracer,
    input_labels: Tensor | None,
    input_slices: Tensor | None,
    output_slices: Tensor | None,
    groups: int,
    transposed: bool,
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """Join the channels at the same index of every group, so that every group loses the same ones.

    Returns:
        The labels of the result's channels, and those of the dimensions that the operation's cost is proportional to.
    """
    reason = tracer.reason("at the place of channels that must stay in another group")
    # The weight has the channels of all groups along its dimension 0 and those of one group along dimension 1.
    if transposed:
        contract(tracer, input_labels, input_slices)
        if input_slices is not None:
            tracer.union_find.join_rows(input_slices.view(groups, -1).T, reason)
        return (None if output_slices is None else output_slices.repeat(groups)), (input_slices, output_slices)
    if input_labels is not None:
        input_labels = tracer.union_find.join_rows(input_labels.view(groups, -1).T, reason)
    contract(tracer, input_labels, input_slices)
    if output_slices is not None:
        tracer.union_find.join_rows(output_slices.view(groups, -1).T, reason)
    return output_slices, (output_slices, input_slices)


@rule("mv", "dot", "vdot")
def vector_product_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Join the dimension that a product with a vector sums over; the rows of a matrix stay."""
    left, right = call.tensors
    left_labels = tracer.labels(left)
    join_or_protect(tracer, left_labels.get(left.ndim - 1), tracer.labels(right).get(0))
    tracer.record_macs(left.numel(), *left_labels.values())
    tracer.set_labels(call.result, {0: left_labels[0]} if left.ndim == 2 and 0 in left_labels else {})


@rule("mm", "addmm", "bmm", "baddbmm")
def matmul_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Join the dimensions that a matrix product sums over, and those of the batch; rows and columns stay apart."""
    *added, left, right = call.tensors
    row, column = left.ndim - 2, left.ndim - 1
    left_labels, right_labels = tracer.labels(left), tracer.labels(right)
    contract(tracer, left_labels.get(column), right_labels.get(row))
    result: DimLabels = {}
    if row in left_labels:
        result[row] = left_labels[row]
    if column in right_labels:
        result[column] = right_labels[column]
        tracer.record_outputs(right_labels[column])
    if left.ndim == 3:
        join_or_protect(tracer, left_labels.get(0), right_labels.get(0))
        if 0 in left_labels or 0 in right_labels:
            result[0] = left_labels[0] if 0 in left_labels else right_labels[0]
    tracer.record_macs(
        call.result.numel() * left.size(column), *result.values(), left_labels.get(column, right_labels.get(row))
    )
    operands = [(call.result.shape, result), *((tensor.shape, tracer.labels(tensor)) for tensor in added)]
    tracer.set_labels(call.result, join_operands(tracer, operands, call.result.ndim))
