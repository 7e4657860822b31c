"""Does a cut network compute what the masked one does? Asked of a network whose every part can be seen in its output.

Whether it does is a matter of the code, whatever the weights are. So weights that hide something, such as layer scales
of a millionth or gains that start at zero, are replaced by some that do not, and float32 tells most cases apart; what
lies between is decided in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.models.cloning import ModelCloner
from passdeploy.models.modes import evaluating, unfused_attention
from passdeploy.runtime.seeds import generator
from passdeploy.slimming.masked import masked_from
from passdeploy.slimming.replay import DecisionLog, decides
from passdeploy.slimming.slim import slim_from
from passdeploy.slimming.tensors import groups_after, like
from passdeploy.slimming.verify import relative_error
from passdeploy.tracing.trace import Trace

SURE = 1e-5, 1e-2  # relative errors in float32 below which two networks are the same, and above which they are not
TOLERANCE = 1e-9  # in float64, for what lies between
MOST_TRIALS = 60  # of parts of a cut, to find the groups that spoil it
MOST_DOUBLED = 100_000_000  # parameters of a network that is compared in float64: a large one in float32 alone


class Comparison:
    """Of the slim networks of one network with its masked ones.

    Args:
        mould: of the network.
        inputs: what it is called with.
        trace: of its walk, or of that of the network it was cut out of.
        groups: its channels.
    """

    def __init__(
        self, cloner: ModelCloner[nn.Module], inputs: Sequence[Any], trace: Trace, groups: Sequence[ChannelGroup]
    ) -> None:
        self._cloner, self._original, self._inputs = cloner.with_state(randomised(cloner.state)), cloner, inputs
        self._trace, self.groups = trace, groups
        self._decides = decides([record.op for record in trace.op_log])
        self._left: ModelCloner[nn.Module] | None = None  # what the plan left that was to be kept
        self.is_large = sum(trace.parameters.values()) > MOST_DOUBLED

    def is_exact(self, plan: Plan, *, keep: bool = False) -> bool:
        """Whether cutting equals masking; `keep`: what the plan leaves will be compared next, with `after`."""
        try:
            error = self._error_of(plan, None, keep=keep)
            if self.is_large or not SURE[0] < error < SURE[1]:
                return error < SURE[1]
            return self._error_of(plan, torch.float64) <= TOLERANCE
        except Exception:  # a part of a cut that ran may meet a number that depends on the rest
            return False

    def after(self, plan: Plan) -> Comparison:
        """The same for what `plan`, found exact and kept, leaves: its cuts are sooner compared."""
        sizes = {name: tuple(tensor.shape) for name, tensor in self._cloner.state.items()}
        assert self._left is not None, "is_exact(plan, keep=True) comes first"
        after = copy.copy(self)
        after._cloner = after._original = self._left  # its weights tell already, or else they must not
        after.groups, after._left = groups_after(self.groups, plan, sizes), None
        return after

    def _error_of(self, plan: Plan, dtype: torch.dtype | None, *, keep: bool = False) -> float:
        decisions, nothing = DecisionLog(), nullcontext()
        reference = masked_from(self._cloner, self.groups, plan)
        expected = self._outputs_of(reference, dtype, decisions.recording() if self._decides else nothing)
        if self._cloner is not self._original and not _tells(expected):
            self._cloner = self._original  # it was made for its own weights
            return self._error_of(plan, dtype, keep=keep)
        smaller = slim_from(self._cloner, self.groups, plan)
        if keep:
            self._left = ModelCloner(smaller)  # as it is before it runs
        found = self._outputs_of(smaller, dtype, decisions.replaying() if self._decides else nothing)
        if len(expected) != len(found):
            return float("inf")
        return max((relative_error(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)

    def _outputs_of(
        self, network: nn.Module, dtype: torch.dtype | None, deciding: AbstractContextManager[None]
    ) -> list[Tensor]:
        if dtype:
            network.to(dtype)
        with torch.no_grad(), evaluating(network), unfused_attention(), deciding:
            outputs = network(*tree_map(lambda leaf: _in_precision(leaf, dtype), tuple(self._inputs)))
        return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


class FailingGroups:
    """The groups of a plan that spoil a comparison, found by halving."""

    def __init__(self, comparison: Comparison, plan: Plan) -> None:
        self._comparison, self._plan, self._trials_left = comparison, plan, MOST_TRIALS
        self.found = set(self._among(list(plan.kept)))

    def _among(self, suspects: Sequence[str]) -> list[str]:
        if len(suspects) == 1 or self._trials_left <= 0:
            return list(suspects)
        self._trials_left -= 2
        halves = suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]
        guilty = [half for half in halves if not self._is_exact(half)]
        return [name for half in guilty for name in self._among(half)] or list(suspects)

    def _is_exact(self, names: Sequence[str]) -> bool:
        return self._comparison.is_exact(Plan({name: self._plan.kept[name] for name in names}))


def _tells(outputs: Sequence[Tensor]) -> bool:
    """Whether there is something in all of it that can be compared."""
    return all(output.numel() and bool(output.isfinite().all()) for output in outputs)


def randomised(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a network without parameters that are all the same; those that vary are shared."""
    return {name: like(old, _varied(name, old)) if _is_even(old) else old for name, old in state.items()}


def _is_even(tensor: Tensor) -> bool:
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or not tensor.numel():
        return False
    values = tensor.detach().flatten()
    return bool((values[:2] == values[0]).all()) and bool((values == values[0]).all())


def _varied(name: str, tensor: Tensor) -> Tensor:
    """Values as they might be after training: gains near one, shifts and tables near zero."""
    noise = torch.randn(tensor.shape, generator=generator("vivid", name)).to(tensor.device, tensor.dtype)
    value = float(tensor.detach().flatten()[0])
    if max(tensor.shape, default=1) < tensor.numel():
        return noise.mul(tensor[0].numel() ** -0.5).add(value)
    if name.endswith("bias"):  # one number, or one for every channel
        return noise.mul(0.1).add(value)
    return noise.mul(0.1).add(1).mul(value if abs(value) > 0.1 else 1.0)


def _in_precision(leaf: Any, dtype: torch.dtype | None) -> Any:
    return leaf.to(dtype) if dtype and isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
