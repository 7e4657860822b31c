"""Rules for Fourier transforms and complex tensors: transforms along other dimensions keep the channels' labels."""

from __future__ import annotations

from passdeploy.tracing.op_call import OpCall, aten
from passdeploy.tracing.rules.elementwise import elementwise_rule, same_shape_rule
from passdeploy.tracing.rules.registry import rule
from passdeploy.tracing.tracer import ChannelTracer

rule("complex", "polar")(elementwise_rule)
rule("_conj", "conj_physical", "_neg_view", "resolve_conj", "resolve_neg")(same_shape_rule)


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def transform_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Keep the labels of all dimensions but those that are transformed, in which every channel meets every other."""
    source = call.tensors[0]
    transformed = {dim % source.ndim for dim in call["dim"]}
    for dim, vector in tracer.labels(source).items():
        if dim in transformed:
            tracer.protect(vector, "a Fourier transform mixes these channels")
    kept = {dim: vector for dim, vector in tracer.labels(source).items() if dim not in transformed}
    tracer.set_labels(call.results[0], kept)


@rule("view_as_real", "view_as_complex")
def complex_view_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Keep the labels of all dimensions but the last one of real and imaginary parts."""
    source = call.tensors[0]
    parts = source.ndim - 1 if call.packet is aten.view_as_complex else source.ndim
    labels = tracer.labels(source)
    if parts in labels:
        tracer.protect(labels[parts], "real and imaginary parts")
    tracer.set_labels(call.results[0], {dim: vector for dim, vector in labels.items() if dim != parts})
