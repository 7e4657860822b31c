"""Rules that compute the labels of an operation's results from those of its inputs, one per kind of operation.

Labels belong to whole dimensions, never to single elements. An element-wise operation joins the labels of its operands.
A contraction (convolution, linear layer, matrix product) joins the channels that it sums over with the weight slices
that read them; its result has the labels of the weight's output dimension.

An operation without a rule is not an error: the tracer (tracer.py) protects the channels that enter it.
"""

from __future__ import annotations

from functools import cache

import torch

from passdeploy.tracing.op_call import functional_packet
from passdeploy.tracing.rules import (
    attention_and_rnn,
    computed_weights,
    contractions,
    fourier,
    movement,
    normalisation,
    reductions,
)
from passdeploy.tracing.rules.deformable import deformable_convolution_rule
from passdeploy.tracing.rules.elementwise import elementwise_rule
from passdeploy.tracing.rules.registry import RULES
from passdeploy.tracing.rules.windows import regions_rule
from passdeploy.tracing.tracer import Rule

_REGISTERED = (
    contractions,
    fourier,
    movement,
    normalisation,
    reductions,
    attention_and_rnn,
    computed_weights,
)  # importing a module registers its rules


@cache
def find_rule(op: torch._ops.OpOverload) -> Rule | None:
    """Return the rule of an operation, or None.

    In-place and `out=` variants have the rule of the operation itself. torch tags element-wise operations, but not all
    variants of each, and newer releases tag more of them: one that is tagged makes all of them element-wise.
    """
    packet = functional_packet(op)
    if (registered := RULES.get(op.overloadpacket) or RULES.get(packet)) is not None:
        return registered
    if str(packet) in ("torchvision.roi_align", "torchvision.roi_pool"):
        return regions_rule
    if str(packet) == "torchvision.deform_conv2d":
        return deformable_convolution_rule
    is_elementwise = any(torch.Tag.pointwise in getattr(packet, name).tags for name in packet.overloads())
    return elementwise_rule if is_elementwise else None
