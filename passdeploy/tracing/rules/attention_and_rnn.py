"""Rules for scaled dot-product attention and for LSTM, GRU and RNN layers."""

from __future__ import annotations

from torch import Tensor

from passdeploy.tracing.op_call import OpCall
from passdeploy.tracing.rules.contractions import contract
from passdeploy.tracing.rules.elementwise import join_operands
from passdeploy.tracing.rules.registry import rule
from passdeploy.tracing.trace import DimLabels
from passdeploy.tracing.tracer import ChannelTracer


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
@rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
@rule("_scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_attention")
def attention_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Join heads over queries, keys and values; attention sums over the width of a query and keeps that of a value.

    In grouped-query attention (`enable_gqa`) a head of keys and values goes with all query heads that it serves.
    """
    query, key, value = call["query"], call["key"], call["value"]
    width_dim, token_dim = query.ndim - 1, query.ndim - 2
    queries, keys, values = (tracer.labels(tensor) for tensor in (query, key, value))
    mask = call.arguments.get("attn_mask", call.arguments.get("attn_bias"))
    operands = [_without_tokens(tracer, tensor, query) for tensor in (query, key, value)]
    if mask is not None and mask.ndim > 2:
        operands.append((mask.shape[:-2], {d: v for d, v in tracer.labels(mask).items() if d < mask.ndim - 2}))
    result = join_operands(tracer, operands, token_dim)
    contract(tracer, queries.get(width_dim), keys.get(width_dim))
    if call.arguments.get("scale") is None and width_dim in queries:
        tracer.protect(queries[width_dim], "the scale of attention depends on this width")
    for labels in (queries, keys, values):
        if token_dim in labels:
            tracer.protect(labels[token_dim], "attention runs along these channels")
    scores = query[..., 0].numel() * key.size(token_dim)
    heads = list(result.values())
    tracer.record_macs(scores * query.size(width_dim), *heads, queries.get(width_dim))
    tracer.record_macs(scores * value.size(width_dim), *heads, values.get(width_dim))
    if width_dim in values:
        result[width_dim] = values[width_dim]
    tracer.set_labels(call.results[0], result)


def _without_tokens(tracer: ChannelTracer, tensor: Tensor, query: Tensor) -> tuple[list[int], DimLabels]:
    """Return the sizes and labels of the dimensions before the tokens, heads repeated to as many as queries have."""
    head_dim = query.ndim - 3
    sizes = list(tensor.shape[: head_dim + 1])
    labels = {dim: vector for dim, vector in tracer.labels(tensor).items() if dim <= head_dim}
    if head_dim >= 0 and 1 < sizes[head_dim] < query.size(head_dim):
        repeats = query.size(head_dim) // sizes[head_dim]
        sizes[head_dim] *= repeats
        if head_dim in labels:
            labels[head_dim] = labels[head_dim].repeat_interleave(repeats)
    return sizes, labels


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Label the initial states with the weight slices that read them.

    One attribute holds the width of all states, so every layer and direction loses the same units.
    """
    weights = call["params"]
    per_layer = 4 if call["has_biases"] else 2  # parameters of one layer and direction; the second reads the state
    readers = [tracer.labels(weight).get(1) for weight in weights[1::per_layer]]
    known = [vector for vector in readers if vector is not None]
    sizes = {len(vector) for vector in known} | {state.size(-1) for state in call.results}
    if len(known) < len(readers) or len(sizes) > 1:
        tracer.protect_and_unlabel(call, "a recurrent network with projections, or of a single channel")
        return
    for vector in known[1:]:
        tracer.join(known[0], vector, "meets channels that must stay")
    for state in call.results:
        last = state.ndim - 1
        if (given := tracer.labels(state).get(last)) is not None:
            tracer.join(known[0], given, "meets channels that must stay")
        tracer.set_labels(state, {**tracer.labels(state), last: known[0]})
