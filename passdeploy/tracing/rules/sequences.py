"""Attention and recurrent networks."""

from __future__ import annotations

from passdeploy.tracing.op_call import OpCall
from passdeploy.tracing.rules.contractions import contract
from passdeploy.tracing.rules.elementwise import join_operands
from passdeploy.tracing.rules.registry import rule
from passdeploy.tracing.tracer import ChannelTracer


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
@rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
@rule("_scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_attention")
def attention_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Heads are joined over queries, keys and values; the width of a value passes, that of a query is summed over."""
    query, key, value = call["query"], call["key"], call["value"]
    width, place = query.ndim - 1, query.ndim - 2
    ours, keys, values = (tracer.labels(tensor) for tensor in (query, key, value))
    mask = call.arguments.get("attn_mask", call.arguments.get("attn_bias"))
    sides = [(tensor.shape[:place], {d: v for d, v in tracer.labels(tensor).items() if d < place})
             for tensor in (query, key, value)]  # fmt: skip
    if mask is not None and mask.ndim > 2:
        sides.append((mask.shape[:-2], {d: v for d, v in tracer.labels(mask).items() if d < mask.ndim - 2}))
    result = join_operands(tracer, sides, place)
    contract(tracer, ours.get(width), keys.get(width))
    if call.arguments.get("scale") is None and width in ours:
        tracer.protect(ours[width], "the scale of attention depends on this width")
    for labels in (ours, keys, values):
        if place in labels:
            tracer.protect(labels[place], "attention runs along these channels")
    scores = query[..., 0].numel() * key.size(place)
    heads = list(result.values())
    tracer.record_macs(scores * query.size(width), *heads, ours.get(width))
    tracer.record_macs(scores * value.size(width), *heads, values.get(width))
    if width in values:
        result[width] = values[width]
    tracer.set_labels(call.results[0], result)


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """The states that a recurrent network starts from have the channels that its weights read states by.

    One number states the width of all of them: every layer and direction loses the same places.
    """
    weights = call["params"]
    of_one = 4 if call["has_biases"] else 2  # parameters of one layer and direction: the second reads the state
    readers = [tracer.labels(weight).get(1) for weight in weights[1::of_one]]
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
