"""The rule for deformable convolutions, whose kernels sample the image at places that are computed as well."""

from __future__ import annotations

from passdeploy.tracing.op_call import OpCall
from passdeploy.tracing.rules.contractions import convolve
from passdeploy.tracing.tracer import ChannelTracer


def deformable_convolution_rule(tracer: ChannelTracer, call: OpCall) -> None:
    """Follow the channels as through a convolution; channels of offsets and mask are places in a kernel.

    Where several groups of channels have offsets of their own, the input channels stay.
    """
    tracer.protect_all([call["offset"], call["mask"]], "each is a place in a kernel")
    x, weight, bias = call["input"], call["weight"], call["bias"]
    if call["offset_groups"] > 1:
        tracer.protect_all([x], "groups of these channels have offsets of their own")
    # Where there is no bias, torchvision makes one of zeros, as many as there are filters.
    convolve(tracer, call, bias if tracer.labels(bias) else None, x.size(1) // weight.size(1))
