"""Find the groups whose removal makes a randomly cut network compute something else than the masked one.

The outcome depends on the code, not on the weights. So weights that would hide an error, such as layer scales of a
millionth or gains that start at zero, are replaced by random ones, and rectifiers leak. Errors in float32 decide most
cases; those between the two bounds, and at another input size all, are decided in float64 where a network runs in it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from passdeploy.channels.blocks import Block
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.errors import first_line
from passdeploy.grouping.leaky_activations import LeakyActivations
from passdeploy.grouping.trial_cut import PlanKey, plan_of, random_plan
from passdeploy.models.chosen_outputs import choose_outputs
from passdeploy.models.cloning import ModelCloner
from passdeploy.models.modes import evaluating, unfused_attention
from passdeploy.models.outputs import comparable_in
from passdeploy.runtime.seeds import generator
from passdeploy.slimming.masked import masked_from
from passdeploy.slimming.replay import DecisionLog, decides
from passdeploy.slimming.slim import slim_from
from passdeploy.slimming.tensors import groups_after, like
from passdeploy.slimming.verify import relative_error
from passdeploy.tracing.trace import Trace

FLOAT32_BOUNDS = 1e-5, 1e-2  # relative errors in float32: below the first outputs are equal, above the second not
FLOAT64_TOLERANCE = 1e-9  # relative error in float64, for cases between the bounds
MAX_FLOAT64_PARAMETERS = 100_000_000  # larger networks are compared in float32 alone, by the upper bound
MAX_BISECTION_TRIALS = 60  # comparisons of parts of a cut


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
        self._is_strict, self._runs_in_float64 = False, False  # the latter: it is known to
        self._leaks = not blocks  # `relu(x + branch)` is `relu(x)` without the branch, since a ReLU twice is one
        self._cut_cloner: ModelCloner[nn.Module] | None = None  # of the cut network that `is_exact` kept
        self.is_large = sum(trace.parameters.values()) > MAX_FLOAT64_PARAMETERS

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
        if self._is_strict and not self.is_large:
            with suppress(_RunsInFloat32AloneError):
                return self._error_in_float64(plan) <= FLOAT64_TOLERANCE
        error = self._error_of(plan, None, keep=keep)
        if self.is_large or not FLOAT32_BOUNDS[0] < error < FLOAT32_BOUNDS[1]:
            return error < FLOAT32_BOUNDS[1]
        return self._error_of(plan, torch.float64) <= FLOAT64_TOLERANCE

    def _error_in_float64(self, plan: Plan) -> float:
        """Return the error in float64.

        Raises:
            _RunsInFloat32AloneError: not even the whole network runs in float64, such as one that makes a position
                embedding in float32 and multiplies it by a weight.
        """
        try:
            return self._error_of(plan, torch.float64)
        except Exception as error:
            if not self._runs_in_float64:
                whole = masked_from(self._cloner, self.groups, Plan({}), self._blocks)
                try:
                    self._outputs_of(whole, torch.float64, nullcontext())
                except Exception:
                    raise _RunsInFloat32AloneError from error
                self._runs_in_float64 = True
            raise

    def strict(self) -> Comparison:
        """Return comparisons of the same network that are all made in float64, if it is not large and runs in that."""
        other = copy.copy(self)
        other._is_strict, other._cut_cloner = True, None
        return other

    def at(self, inputs: Sequence[Any]) -> Comparison:
        """Return comparisons of the same network on other inputs."""
        other = copy.copy(self)
        other.inputs, other._cut_cloner = inputs, None
        return other

    def after(self, plan: Plan) -> Comparison:
        """Return comparisons for the network that `plan` left, which `is_exact` kept; a smaller network is faster."""
        assert self._cut_cloner is not None, "is_exact(plan, keep=True) comes first"
        after = copy.copy(self)
        after._cloner = after._original = self._cut_cloner  # constant weights are random already, where they can be
        after.groups, after._cut_cloner = groups_after(self.groups, plan), None
        return after

    def _error_of(self, plan: Plan, dtype: torch.dtype | None, *, keep: bool = False) -> float:
        """Return the largest relative error of an output of the cut network.

        Args:
            plan: channels to keep.
            dtype: to compute in; None: as the network is.
            keep: keep the cut network for `after`.
        """
        decisions, nothing = DecisionLog(), nullcontext()
        reference = masked_from(self._cloner, self.groups, plan, self._blocks)
        expected = self._outputs_of(reference, dtype, decisions.recording() if self._decides else nothing)
        if (self._leaks or self._cloner is not self._original) and not _is_comparable(expected):
            self._cloner, self._leaks = self._original, False  # it works with its own weights and activations only
            return self._error_of(plan, dtype, keep=keep)
        smaller = slim_from(self._cloner, self.groups, plan, self._blocks)
        if keep:
            self._cut_cloner = ModelCloner(smaller)  # a run might change the network
        found = self._outputs_of(smaller, dtype, decisions.replaying() if self._decides else nothing)
        if len(expected) != len(found):
            return float("inf")
        return max((relative_error(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)

    def _outputs_of(
        self, network: nn.Module, dtype: torch.dtype | None, deciding: AbstractContextManager[None]
    ) -> list[Tensor]:
        if dtype:
            network.to(dtype)
        leaking = LeakyActivations() if self._leaks else nullcontext()
        with torch.no_grad(), evaluating(network), unfused_attention(), leaking, deciding:
            outputs = network(*tree_map(lambda leaf: _in_precision(leaf, dtype), tuple(self.inputs)))
        return comparable_in(choose_outputs(outputs, self._choice))


@dataclass(frozen=True)
class Failure:
    """Groups whose removal of channels changes the function, and the reason in words."""

    groups: frozenset[str]
    reason: str


def find_failing_groups(
    comparison: Comparison,
    *,
    trials: int,
    cut_successively: bool,
    other_inputs: Sequence[Any] | None = None,
    more_trials: Iterable[PlanKey] = (),
) -> Failure | None:
    """Find groups that make a randomly cut network differ from the masked one.

    Args:
        comparison: of the whole network.
        trials: number of random cuts to compare, until one differs.
        cut_successively: let each cut continue from what the cut before left; else each cuts the whole network.
        other_inputs: inputs of another size, for all cuts but the first; for a large network, for that one.
        more_trials: keys of further cuts of the whole network.

    Returns:
        None if all are equal.
    """
    whole = comparison
    for index in range(trials):
        is_other = other_inputs is not None and (index > 0 or whole.is_large)
        here = comparison
        if is_other and other_inputs is not None:
            here = comparison.at(other_inputs)
            if _sizes_of_samples(other_inputs) != _sizes_of_samples(whole.inputs):
                here = here.strict()  # an error that only another image size shows may be as small as rounding
        plan = random_plan(here.groups, index, with_odd_widths=is_other)
        if not plan.kept:
            break
        is_continued = cut_successively and index + 1 < trials
        if not here.is_exact(plan, keep=is_continued):
            holds_here_only = is_other and comparison.is_exact(plan)
            if is_other and not (plain := comparison.at(here.inputs)).is_exact(plan):
                here = plain  # float32 shows it as well, and takes less time
            return Failure(frozenset(FailingGroups(here, plan).names()), _ONE_SIZE if holds_here_only else _CHANGED)
        if is_continued:
            comparison = here.after(plan).at(whole.inputs)
    strict = whole.strict()  # a norm may hide a branch that was flipped, but for its epsilon
    for key in more_trials:
        plan = plan_of(strict.groups, key)
        if plan.kept and not strict.is_exact(plan):
            return Failure(frozenset(FailingGroups(strict, plan).names()), _CHANGED)
    return None


_CHANGED = "the function changes with their number, in a way that no mask can follow"
_ONE_SIZE = "they can be told apart at one input size only: positions and channels are reshaped into each other"


class FailingGroups:
    """Binary search for the groups of a plan that make the cut network differ from the masked one."""

    def __init__(self, comparison: Comparison, plan: Plan) -> None:
        self._comparison, self._plan, self._trials_left = comparison, plan, MAX_BISECTION_TRIALS

    def names(self) -> list[str]:
        """Run the comparisons and return the names of the groups: without them the rest of the plan is exact.

        Groups are cut together from the first one on. The one with which the network first differs has a part in the
        difference, even if it differs only where others are cut as well.
        """
        found, rest = list[str](), list(self._plan.kept)
        exact, failing = 0, len(rest)  # numbers of groups that can be cut together, and that cannot
        while self._trials_left > 0:
            if failing - exact > 1:
                middle = (exact + failing) // 2
                exact, failing = (middle, failing) if self._is_exact(rest[:middle]) else (exact, middle)
                continue
            found.append(rest.pop(exact))
            if exact == len(rest):
                return found
            failing = exact + 1  # groups that fail are often neighbours
            if self._is_exact(rest[:failing]):
                if failing == len(rest) or self._is_exact(rest):
                    return found
                exact, failing = failing, len(rest)
        return found + rest

    def _is_exact(self, names: Sequence[str]) -> bool:
        self._trials_left -= 1
        return self._comparison.is_exact(Plan({name: self._plan.kept[name] for name in names}))


def _sizes_of_samples(inputs: Sequence[Any]) -> list[tuple[int, ...]]:
    """List the shapes of the tensors among the inputs, without the batch."""
    return [tuple(leaf.shape[1:]) for leaf in tree_leaves(tuple(inputs)) if isinstance(leaf, Tensor)]


def _is_comparable(outputs: Sequence[Tensor]) -> bool:
    """True if no output is empty, and all values are finite."""
    return all(output.numel() and bool(output.isfinite().all()) for output in outputs)


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


def _in_precision(leaf: Any, dtype: torch.dtype | None) -> Any:
    return leaf.to(dtype) if dtype and isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
