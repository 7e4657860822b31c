"""Compare a slim network with the masked one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.errors import EquivalenceError
from passdeploy.models.modes import evaluating
from passdeploy.slimming.masked import masked
from passdeploy.slimming.replay import DecisionLog
from passdeploy.slimming.slim import slim


def verify(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: Plan,
    inputs: Tensor | Sequence[Tensor],
    *,
    tolerance: float,
) -> float:
    """Compare `slim` with `masked` on real inputs; returns the largest relative error.

    The error of an output is its largest difference divided by its largest absolute value. A detector's boxes are
    ranked once: the slim network takes over what the masked one decided, since rounding settles ties either way.

    Raises:
        EquivalenceError: it is above `tolerance`, or not a number.
    """
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    reference, smaller, decisions = masked(model, groups, plan), slim(model, groups, plan), DecisionLog()
    with torch.no_grad(), evaluating(reference), evaluating(smaller):
        with decisions.recording():
            expected = tree_leaves(reference(*arguments))
        with decisions.replaying():
            found = tree_leaves(smaller(*arguments))
    error = max(relative_error(a, b) for a, b in zip(expected, found, strict=True) if isinstance(a, Tensor))
    if not error <= tolerance:
        raise EquivalenceError(
            f"the slim network differs from the masked one by {error:.1e} (relative), allowed is {tolerance:.1e}.\n"
            "This is a defect of passdeploy: please report the model. `prune.exclude` can leave layers alone."
        )
    return error


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Largest difference over largest magnitude; infinite where shapes differ or a value is not finite."""
    if expected.shape != found.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    difference = (expected.double() - found.double()).abs().max()
    error = float(difference / expected.double().abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")
