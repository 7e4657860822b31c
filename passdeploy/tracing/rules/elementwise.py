"""Rules for element-wise operations and for operations that make a tensor of the same shape."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from passdeploy.tracing.op_call import OpCall
from passdeploy.tracing.rules.registry import rule
from passdeploy.tracing.trace import DimLabels
from passdeploy.tracing.tracer import ChannelTracer


# These have no tag; torch 2.11 and older lack that of `leaky_relu`.
@rule("copy", "fill", "zero", "normal", "uniform", "bernoulli", "native_dropout", "feature_dropout", "floor_divide")
@rule("hardswish", "log_sigmoid_forward", "_prelu_kernel", "rrelu_with_noise", "leaky_relu")
def elementwise_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Join the labels of the operands: removing a channel from one removes it from all."""
    operands = [(tensor.shape, tracer.labels(tensor)) for tensor in call.tensors]
    for result in call.results:
        tracer.set_labels(result, join_operands(tracer, operands, result.ndim))


def join_operands(tracer: ChannelTracer, operands: Sequence[tuple[Sequence[int], DimLabels]], ndim: int) -> DimLabels:
    """Join the labels of operands that broadcast against each other.

    Args:
        tracer: joins and protects the labels.
        operands: shape and labels of each.
        ndim: number of dimensions of the result.

    Returns:
        The labels of the result.
    """
    aligned: dict[int, list[Tensor | None]] = {}
    for shape, labels in operands:
        for dim, size in enumerate(shape):
            if size > 1:  # a dimension of size one broadcasts, and has no channels
                aligned.setdefault(ndim - len(shape) + dim, []).append(labels.get(dim))
    result: DimLabels = {}
    for dim, vectors in aligned.items():
        labelled = [vector for vector in vectors if vector is not None]
        if not labelled:
            continue
        for vector in labelled[1:]:
            tracer.join(labelled[0], vector, "meets channels that must stay")
        if len(labelled) < len(vectors):
            tracer.protect(labelled[0], "meets a tensor whose size cannot change")
            if all(map(tracer.is_fixed, labelled)):
                continue  # a place of a position embedding: nothing to follow any further
        result[dim] = labelled[0]
    return result


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
@rule("clone", "detach", "alias", "_to_copy", "lift_fresh")
def same_shape_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Copy the labels of a tensor to a new one of the same shape."""
    tracer.set_labels(call.results[0], dict(tracer.labels(call.tensors[0])))


@rule("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided")
def new_tensor_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Give no labels to a tensor that takes only dtype and device from another."""
    tracer.set_labels(call.results[0], {})


@rule("as_strided_")
def as_strided_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Keep the labels where only strides change, as in pooling to one pixel; protect them where the shape changes."""
    source = call["self"]
    if call.result.shape == source.shape:
        tracer.set_labels(call.result, tracer.labels(source))
    else:
        tracer.protect_and_unlabel(call, "given another shape in place")


@rule("glu")
def glu_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Join both halves of a gated linear unit: a channel and its gate are removed together."""
    source = call["self"]
    dim, labels = call["dim"] % source.ndim, dict(tracer.labels(source))
    if (vector := labels.get(dim)) is not None:
        labels[dim] = tracer.union_find.join_rows(
            vector.view(2, -1).T, tracer.reason("gated by channels that must stay")
        )
    tracer.set_labels(call.result, labels)
