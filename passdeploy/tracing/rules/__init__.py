"""One rule per tensor operation: how the labels of its inputs become the labels of its results.

A rule may rely on three facts. Labels sit along dimensions, never on single elements. Whatever
two tensors do element by element joins their labels. A contraction (convolution, linear layer, matrix
product) ends the labels it sums over and starts those of its weight's output dimension.

An operation that is missing here is not an error: the walk (follow.py) protects what touches it.
"""

from __future__ import annotations

import torch

from passdeploy.tracing.rules import contractions, movement, normalisation, reductions, sequences
from passdeploy.tracing.rules.elementwise import elementwise_rule
from passdeploy.tracing.rules.registry import RULES
from passdeploy.tracing.rules.windows import regions_rule
from passdeploy.tracing.tracer import Rule

_REGISTERED = (contractions, movement, normalisation, reductions, sequences)  # by being imported


def find_rule(op: torch._ops.OpOverload) -> Rule | None:
    """The rule of an operation; torch itself marks the element-wise ones."""
    if (found := RULES.get(op.overloadpacket)) is not None:
        return found
    if str(op.overloadpacket) in ("torchvision.roi_align", "torchvision.roi_pool"):
        return regions_rule
    return elementwise_rule if torch.Tag.pointwise in op.tags else None
