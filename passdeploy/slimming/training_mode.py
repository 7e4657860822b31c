"""Compare a slim network with the masked one in training mode, where chance and the statistics of a batch come in."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from passdeploy.models.cloning import deep_copy
from passdeploy.models.input_sizes import doubled
from passdeploy.slimming.agreement import SameInputs, are_finite, largest_error
from passdeploy.slimming.float64 import NarrowingWatch, in_float64, is_large, to_float64_
from passdeploy.slimming.replay import DecisionLog

_MOST_ROUNDING = 1e-2  # relative error in float32: statistics of a few samples magnify rounding


def train_alike(reference: nn.Module, network: nn.Module, run: SameInputs, tolerance: float) -> bool:
    """True if copies of two networks compute the same in training mode, without dropout.

    An error above `tolerance` is looked at in float64. Where a network does not run in that, or is large, only an error
    above one hundredth counts. Also true where the reference does not run in training mode, as it may want targets, or
    answers in numbers that are not finite.

    Raises:
        Exception: whatever the code of `network` raises, where the reference runs.
    """
    training = replace(run, training=True, arguments=doubled(run.arguments))
    error = _error(deep_copy(reference), deep_copy(network), training)
    if error is None or error <= tolerance:
        return True
    wide = None if error == float("inf") or is_large(reference) else _error_in_float64(reference, network, training)
    return error <= _MOST_ROUNDING if wide is None else wide <= tolerance


def _error_in_float64(reference: nn.Module, network: nn.Module, training: SameInputs) -> float | None:
    """Return the error in float64; None where a network computes in its own type alone."""
    wide = replace(training, arguments=in_float64(training.arguments))
    try:
        with NarrowingWatch() as narrowing:
            error = _error(to_float64_(deep_copy(reference)), to_float64_(deep_copy(network)), wide)
    except Exception:  # any kind: float64 meets float32 somewhere
        return None
    return None if narrowing.was_seen else error


def _error(reference: nn.Module, network: nn.Module, run: SameInputs) -> float | None:
    """Run two networks and return the largest relative error; None where the reference fails, or is not finite."""
    decisions = DecisionLog()
    try:
        expected = run.outputs_of(reference, decisions.recording())
        if not are_finite(expected):
            return None
    except Exception:  # any kind: it is the user's code
        return None
    found = run.outputs_of(network, decisions.replaying())
    return max(largest_error(expected, found), decisions.error)
