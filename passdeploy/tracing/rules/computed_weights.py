"""Rules for weights that are computed from parameters in every call: weight norm and fake quantisation."""

from __future__ import annotations

from passdeploy.tracing.op_call import OpCall
from passdeploy.tracing.rules.contractions import join_or_protect
from passdeploy.tracing.rules.registry import rule
from passdeploy.tracing.tracer import ChannelTracer


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Join each slice of the direction with its magnitude; the norm of a slice is that of what remains of it.

    `masked` sets removed parts of the direction to zero, where they add nothing to a norm.
    """
    direction, magnitude, dim = call["v"], call["g"], int(call["dim"])
    if not tracer.is_state(direction):
        tracer.protect_and_unlabel(call, "the norm of a weight that is no parameter")
        return
    labels = dict(tracer.labels(direction))
    join_or_protect(tracer, labels.get(dim), tracer.labels(magnitude).get(dim))
    tracer.set_labels(call.results[0], labels)


@rule("_fused_moving_avg_obs_fq_helper", "_fake_quantize_learnable_per_channel_affine")
@rule("fake_quantize_per_channel_affine_cachemask", "fake_quantize_per_tensor_affine_cachemask")
@rule("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "_fake_quantize_learnable_per_tensor_affine")
def fake_quantisation_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Protect the channels: ranges were observed on all of them, and observers may change in every call."""
    tracer.protect_and_unlabel(call, "fake quantisation: cut the network first, and prepare the slim one for it")
