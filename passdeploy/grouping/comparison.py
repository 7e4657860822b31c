"""Compare randomly cut copies of a network with masked ones.

The outcome depends on the code, not on the weights. So weights that would hide an error, such as layer scales of a
millionth or gains that start at zero, are replaced by random ones, and rectifiers leak. Errors in float32 decide most
cases; those between the two bounds, and at another input size all, are decided in float64 where a network runs in it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.channels.blocks import Block
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.errors import first_line
from passdeploy.grouping.leaky_activations import LeakyActivations
from passdeploy.models.chosen_outputs import choose_outputs
from passdeploy.models.cloning import ModelCloner
from passdeploy.models.modes import evaluating, unfused_attention
from passdeploy.models.outputs import comparable_in
from passdeploy.models.same_draws import SameDraws
from passdeploy.runtime.seeds import generator
from passdeploy.slimming.agreement import are_finite, copied, have_finite_numbers, relative_error
from passdeploy.slimming.float64 import MAX_FLOAT64_PARAMETERS, NarrowingWatch, in_float64, to_float64_
from passdeploy.slimming.masked import masked_from
from passdeploy.slimming.parts import PART_TOLERANCE, error_by_part, has_faint_parts
from passdeploy.slimming.replay import DecisionLog, decides
from passdeploy.slimming.slim import slim_from
from passdeploy.slimming.tensors import groups_after, like
from passdeploy.slimming.training_mode import TrainingRun, train_alike
from passdeploy.tracing.trace import Trace

FLOAT32_BOUNDS = 1e-5, 1e-2  # relative errors in float32: below the first outputs are equal, above the second not
FLOAT64_TOLERANCE = 1e-9  # relative error in float64, for cases between the bounds


class _RunsInFloat32AloneError(Exception):
    """A network that cannot be compared in float64."""


class Comparison:
    """Comparisons of cut with masked copies of one network.

    Args:
        cloner: makes copies of the network.
        inputs: its positional arguments.
        trace: of the network, or of the one it was cut from.
        groups: its channel groups.
        blocks: its blocks, if plans skip some.
    """

    def __init__(
        self,
        cloner: ModelCloner[nn.Module],
        inputs: Sequence[Any],
        trace: Trace,
        groups: Sequence[ChannelGroup],
        blocks: Sequence[Block] = (),
    ) -> None:
        self._cloner, self._original, self.inputs = cloner.with_state(randomised(cloner.state)), cloner, inputs
        self.groups, self._blocks = groups, blocks
        self._decides, self._choice = decides([record.op for record in trace.op_log]), trace.outputs
        self._is_strict = self._is_by_part = False
        self._known: dict[str, bool] = {}  # about the code of the network; copies of this comparison share it
        self._is_training = False
        self._leaks = not blocks  # `relu(x + branch)` is `relu(x)` without the branch, since a ReLU twice is one
        self._cut_cloner: ModelCloner[nn.Module] | None = None  # of the cut network that `is_exact` kept
        self.is_large = sum(trace.parameters.values()) > MAX_FLOAT64_PARAMETERS  # compared by the upper bound

    def is_exact(self, plan: Plan, *, keep: bool = False) -> bool:
        """True if the network cut by `plan` computes what the masked one does.

        Args:
            plan: channels to keep.
            keep: keep the cut network for `after`.
        """
        return self.fault_of(plan, keep=keep) is None

    def fault_of(self, plan: Plan, *, keep: bool = False) -> str | None:
        """Return None where `is_exact` is True, else the error that the cut network raised, or "" if it raised none."""
        try:
            return None if self._agrees(plan, keep=keep) else ""
        except Exception as error:  # the whole cut runs, but a part of it may raise
            return first_line(error)

    def _agrees(self, plan: Plan, *, keep: bool) -> bool:
        if self._is_training:
            reference, smaller = (
                cut(self._cloner, self.groups, plan, self._blocks) for cut in (masked_from, slim_from)
            )
            return train_alike(
                reference,
                smaller,
                self._training_run,
                tolerance=FLOAT32_BOUNDS[0],
                wide_tolerance=FLOAT64_TOLERANCE,
            )
        if self._is_by_part:
            return self._agrees_by_part(plan)
        if self._is_strict and not self.is_large:
            with suppress(_RunsInFloat32AloneError):
                return self._error_in_float64(plan) <= FLOAT64_TOLERANCE
        error = self._error_of(plan, keep=keep)
        if self.is_large or not FLOAT32_BOUNDS[0] < error < FLOAT32_BOUNDS[1]:
            return error < FLOAT32_BOUNDS[1]
        error = self._error_of(plan, wide=True)
        return error <= FLOAT64_TOLERANCE or (error <= FLOAT32_BOUNDS[0] and self._has_float32_parts())

    def _error_in_float64(self, plan: Plan) -> float:
        """Return the error in float64.

        Raises:
            _RunsInFloat32AloneError: not even the whole network runs in float64, such as one that makes a position
                embedding in float32 and multiplies it by a weight; or it differs, and computes a part in float32.
        """
        try:
            error = self._error_of(plan, wide=True)
        except Exception as problem:
            try:
                self._has_float32_parts()
            except Exception:
                raise _RunsInFloat32AloneError from problem
            raise
        if error > FLOAT64_TOLERANCE and self._has_float32_parts():
            raise _RunsInFloat32AloneError
        return error

    def _agrees_by_part(self, plan: Plan) -> bool:
        """Compare in float64 each part of an output by its own magnitude; True where that cannot be told."""
        try:
            expected, found, _ = self._answers_to(plan, wide=True)
            return max(map(error_by_part, expected, found), default=0.0) <= PART_TOLERANCE or self._has_float32_parts()
        except Exception:  # it runs in float32 alone, as was compared before
            return True

    def _has_float32_parts(self) -> bool:
        """Run the network without a cut in float64; True if it computes a part in a narrower type all the same."""
        if "has_float32_parts" not in self._known:
            whole, watch = masked_from(self._cloner, self.groups, Plan({}), self._blocks), NarrowingWatch()
            self._outputs_of(whole, watch, wide=True)
            self._known["has_float32_parts"] = watch.was_seen
        return self._known["has_float32_parts"]

    def runs(self) -> bool:
        """True if the network without a cut runs on these inputs, and answers in finite numbers."""
        try:
            whole = masked_from(self._cloner, self.groups, Plan({}), self._blocks)
            if not self._is_training:
                return are_finite(self._outputs_of(whole, nullcontext()))
            with SameDraws().recording(whole):
                return have_finite_numbers(self._training_run.outputs_of(whole)[0])
        except Exception:  # the user's code may raise anything
            return False

    @property
    def _training_run(self) -> TrainingRun:
        return TrainingRun(self.inputs, self._choice, LeakyActivations if self._leaks else nullcontext)

    def strict(self) -> Comparison:
        """Return comparisons of the same network that are all made in float64, if it is not large and runs in that."""
        other = copy.copy(self)
        other._is_strict, other._cut_cloner = True, None
        return other

    def by_part(self) -> Comparison:
        """Return comparisons of the same network that look at every part of an output by itself, see `parts.py`."""
        other = copy.copy(self)
        other._is_by_part, other._cut_cloner = True, None
        return other

    @property
    def has_faint_parts(self) -> bool:
        """True if comparisons so far have met an output of which parts are very small beside others."""
        return self._known.get("has_faint_parts", False)

    def at(self, inputs: Sequence[Any]) -> Comparison:
        """Return comparisons of the same network on other inputs."""
        other = copy.copy(self)
        other.inputs, other._cut_cloner = inputs, None
        return other

    def in_training(self, inputs: Sequence[Any]) -> Comparison:
        """Return comparisons of the same network in training mode, whichever way chance decides, on other inputs."""
        other = self.at(inputs)
        other._is_training = True
        if not other.runs():
            other._cloner, other._leaks = other._original, False  # it may with its own weights and activations
        return other

    def after(self, plan: Plan) -> Comparison:
        """Return comparisons for the network that `plan` left, which `is_exact` kept; a smaller network is faster."""
        assert self._cut_cloner is not None, "is_exact(plan, keep=True) comes first"
        after = copy.copy(self)
        after._cloner = after._original = self._cut_cloner  # constant weights are random already, where they can be
        after.groups, after._cut_cloner = groups_after(self.groups, plan), None
        return after

    def _error_of(self, plan: Plan, *, wide: bool = False, keep: bool = False) -> float:
        """Return the largest relative error of an output of the cut network; the arguments are as for `_answers_to`."""
        expected, found, error = self._answers_to(plan, wide=wide, keep=keep)
        if len(expected) != len(found):
            return float("inf")
        if not self.has_faint_parts:
            self._known["has_faint_parts"] = any(map(has_faint_parts, expected))
        return max([error, *map(relative_error, expected, found)])

    def _answers_to(
        self, plan: Plan, *, wide: bool = False, keep: bool = False
    ) -> tuple[list[Tensor], list[Tensor], float]:
        """Run the masked and the cut network; return the outputs of both, and the error of decisions that differ.

        Args:
            plan: channels to keep.
            wide: compute in float64.
            keep: keep the cut network for `after`.
        """
        decisions, nothing = DecisionLog(), nullcontext()
        reference = masked_from(self._cloner, self.groups, plan, self._blocks)
        expected = self._outputs_of(reference, decisions.recording() if self._decides else nothing, wide=wide)
        if (self._leaks or self._cloner is not self._original) and not _is_comparable(expected):
            self._cloner, self._leaks = self._original, False  # it works with its own weights and activations only
            return self._answers_to(plan, wide=wide, keep=keep)
        smaller = slim_from(self._cloner, self.groups, plan, self._blocks)
        if keep:
            self._cut_cloner = ModelCloner(smaller)  # a run might change the network
        found = self._outputs_of(smaller, decisions.replaying() if self._decides else nothing, wide=wide)
        return expected, found, decisions.error

    def _outputs_of(
        self, network: nn.Module, deciding: AbstractContextManager[None], *, wide: bool = False
    ) -> list[Tensor]:
        if wide:
            to_float64_(network)
        leaking = LeakyActivations() if self._leaks else nullcontext()
        inputs = in_float64(self.inputs) if wide else self.inputs
        with torch.no_grad(), evaluating(network), unfused_attention(), leaking, deciding:
            return comparable_in(choose_outputs(network(*copied(inputs)), self._choice))


def _is_comparable(outputs: Sequence[Tensor]) -> bool:
    """True if no output is empty, and all values are finite."""
    return all(output.numel() for output in outputs) and are_finite(outputs)


def randomised(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace parameters whose values are all the same by random ones; other tensors are shared, not copied."""
    return {name: like(old, _random_like(name, old)) if _is_constant(old) else old for name, old in state.items()}


def _is_constant(tensor: Tensor) -> bool:
    """True for a float parameter whose values are all the same."""
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or not tensor.numel():
        return False
    values = tensor.detach().flatten()
    return bool((values[:2] == values[0]).all()) and bool((values == values[0]).all())


def _random_like(name: str, tensor: Tensor) -> Tensor:
    """Draw values as they might be after training: gains near one, shifts and tables near zero."""
    noise = torch.randn(tensor.shape, generator=generator("vivid", name)).to(tensor.device, tensor.dtype)
    value = float(tensor.detach().flatten()[0])
    if max(tensor.shape, default=1) < tensor.numel():
        return noise.mul(tensor[0].numel() ** -0.5).add(value)
    if name.endswith("bias"):  # a scalar, or a value for each channel
        return noise.mul(0.1).add(value)
    return noise.mul(0.1).add(1).mul(value if abs(value) > 0.1 else 1.0)
