"""Compare a slim network with the masked one in training mode, where chance and the statistics of a batch come in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.errors import PassDeployError
from passdeploy.models.chosen_outputs import OutputChoice, choose_outputs
from passdeploy.models.cloning import deep_copy
from passdeploy.models.modes import evaluating, unfused_attention
from passdeploy.models.outputs import comparable_in
from passdeploy.models.own_state import OwnState
from passdeploy.models.same_draws import SameDraws, largest_over_chances
from passdeploy.models.without_dropout import without_dropout
from passdeploy.models.wrappers import calling_eagerly
from passdeploy.runtime.seeds import generator
from passdeploy.slimming.agreement import copied, have_finite_numbers, largest_error
from passdeploy.slimming.float64 import NarrowingWatch, in_float64, is_large, to_float64_
from passdeploy.slimming.replay import DecisionLog

_LEAST_SHARE = 1e-4  # of the largest output: a loss of two equal answers is zero up to rounding
_MOST_ROUNDING = 1e-2  # relative error in float32: statistics of a few samples magnify rounding
_MARGIN = 10  # by which errors may exceed those of weights that are off by their rounding


@dataclass(frozen=True)
class TrainingRun:
    """Inputs and surroundings of runs in training mode."""

    inputs: Sequence[Any]  # positional arguments
    choice: OutputChoice | None  # of the outputs, where those of training mode have them as well; None: all
    around: Callable[[], AbstractContextManager[Any]] = nullcontext  # a context to run each network in

    def outputs_of(
        self, network: nn.Module, deciding: AbstractContextManager[None] | None = None, *, goes_on: bool | None = None
    ) -> tuple[list[Tensor], bool]:
        """Run a network in training mode, and list what can be compared of its outputs.

        Where the call changes more than the statistics of batch norms, such as a queue of features, it runs in training
        mode once more, and then in evaluation mode, which show what was changed after use. Gradients are recorded: some
        code does something else without, or asks for gradients itself.

        Args:
            network: the network; its state changes.
            deciding: a context that records decisions, or replays them.
            goes_on: run it three times; None: find out.

        Returns:
            The outputs of all runs, and whether it ran three times.
        """
        with calling_eagerly(network), unfused_attention(), self.around(), deciding or nullcontext():
            with torch.enable_grad(), evaluating(network, training=True), without_dropout(network):
                before = OwnState(network)
                outputs = self._outputs_in_training(network)
                goes_on = before.has_changed() if goes_on is None else goes_on
                if goes_on:
                    outputs += self._outputs_in_training(network)
            if goes_on:
                with torch.no_grad(), evaluating(network):
                    outputs += comparable_in(choose_outputs(network(*copied(self.inputs)), self.choice))
        return outputs, goes_on

    def _outputs_in_training(self, network: nn.Module) -> list[Tensor]:
        answer = network(*copied(self.inputs))
        with suppress(PassDeployError):  # another container than in evaluation mode, such as a dictionary of losses
            answer = choose_outputs(answer, self.choice)
        return [output.detach() for output in comparable_in(answer)]


def train_alike(
    reference: nn.Module, network: nn.Module, run: TrainingRun, *, tolerance: float, wide_tolerance: float
) -> bool:
    """True if copies of two networks compute the same in training mode, whichever way chance decides.

    An error above `tolerance` is looked at in float64. Where a network does not run in that, or is large, it is
    compared with the error that rounding all weights makes. Also true where the reference does not run in training
    mode, as it may want targets, or gives an answer without any finite number.

    Args:
        reference: the masked network.
        network: the slim one.
        run: how both are run.
        tolerance: a relative error that is allowed without a closer look.
        wide_tolerance: the largest relative error that is allowed in float64.

    Raises:
        Exception: whatever the code of `network` raises, where the reference runs.
    """
    error = _error(reference, network, run, enough=tolerance)
    if error is None or error <= tolerance:
        return True
    return _is_close(error, reference, network, run, wide_tolerance) or _is_by_chance(error, reference, run)


def _is_close(error: float, reference: nn.Module, network: nn.Module, run: TrainingRun, wide_tolerance: float) -> bool:
    """True if an error in float32 is one of rounding."""
    if error == float("inf"):
        return False
    if (wide := _error_in_float64(reference, network, run, enough=wide_tolerance)) is None:
        return _is_rounding(error, reference, run)
    wide_run = replace(run, inputs=in_float64(run.inputs))
    return wide <= wide_tolerance or _is_rounding(wide, to_float64_(deep_copy(reference)), wide_run)


def _is_by_chance(error: float, reference: nn.Module, run: TrainingRun) -> bool:
    """True if a network differs from itself as well, since it draws from a generator that is hidden in its code."""
    own = _error(reference, reference, run, enough=error)
    return own is not None and own >= min(_MOST_ROUNDING, error / _MARGIN)


def _is_rounding(error: float, reference: nn.Module, run: TrainingRun) -> bool:
    """True if an error is about as large as that of a network of which all weights are rounded."""
    rounding = _error(reference, _rounded(reference), run, enough=_MOST_ROUNDING) or 0.0
    return error <= min(_MOST_ROUNDING, _MARGIN * rounding)


def _error(reference: nn.Module, network: nn.Module, run: TrainingRun, *, enough: float) -> float | None:
    """Return the largest relative error of an output or a decision; None where the reference fails every time."""

    def compare(draws: SameDraws) -> float | None:
        decisions = DecisionLog()
        one, other = deep_copy(reference), deep_copy(network)
        try:
            with draws.recording(one):
                expected, goes_on = run.outputs_of(one, decisions.recording())
        except Exception:  # any kind: it is the user's code
            return None
        with draws.replaying(other):
            found, _ = run.outputs_of(other, decisions.replaying(), goes_on=goes_on)
        if not have_finite_numbers(expected):
            return None
        if len(found) == len(expected) and not all(map(_have_the_same_gaps, expected, found)):
            return float("inf")
        expected, found = ([output.where(output.isfinite(), 0) for output in one] for one in (expected, found))
        return max(largest_error(expected, found, least=_LEAST_SHARE), decisions.error)

    return largest_over_chances(compare, enough=enough)


def _have_the_same_gaps(expected: Tensor, found: Tensor) -> bool:
    """True if what is not finite in two outputs, such as a logit of minus infinity, is the same."""
    gaps = ~expected.isfinite()
    return (
        expected.shape == found.shape
        and torch.equal(gaps, ~found.isfinite())
        and torch.equal(expected[gaps].nan_to_num(), found[gaps].nan_to_num())
    )


def _error_in_float64(reference: nn.Module, network: nn.Module, run: TrainingRun, *, enough: float) -> float | None:
    """Return the error in float64; None where a network is large, or computes in its own type alone."""
    if is_large(reference):
        return None
    with suppress(Exception), NarrowingWatch() as narrowing:  # of any kind: float64 meets float32 somewhere
        wide = to_float64_(deep_copy(reference)), to_float64_(deep_copy(network))
        error = _error(*wide, replace(run, inputs=in_float64(run.inputs)), enough=enough)
        return None if narrowing.was_seen else error
    return None


def _rounded(network: nn.Module) -> nn.Module:
    """Copy a network, with every weight a rounding error larger or smaller."""
    other = deep_copy(network)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.is_floating_point():
                signs = torch.randint(0, 2, parameter.shape, generator=generator("round", name)).to(parameter.device)
                parameter.data.mul_(1 + (2 * signs - 1).to(parameter.dtype) * torch.finfo(parameter.dtype).eps)
    return other
