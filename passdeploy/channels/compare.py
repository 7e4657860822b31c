"""Does a cut network compute what the masked one does? Asked of a network whose every part can be seen in its output.

Whether it does is a matter of the code, whatever the weights are. So weights that hide something, such as layer scales
of a millionth or gains that start at zero, are replaced by some that do not, and float32 tells most cases apart; what
lies between is decided in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from passdeploy.chance import generator
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.trace import Trace
from passdeploy.cloning import clone
from passdeploy.cutting import like
from passdeploy.decisions import Decisions, decides
from passdeploy.plan import Plan
from passdeploy.running import evaluating, plain_attention
from passdeploy.slimming import masked, relative_error, slim

SURE = 1e-5, 1e-2  # relative errors in float32 below which two networks are the same, and above which they are not
TOLERANCE = 1e-9  # in float64, for what lies between
MOST_DOUBLED = 100_000_000  # parameters of a network that is compared in float64: a large one in float32 alone


class Comparison:
    """Of the slim networks of one network with its masked ones.

    Args:
        model: the network.
        inputs: what it is called with.
        trace: of its walk.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Any], trace: Trace) -> None:
        self._model, self._dull, self._inputs = vivid(model), model, inputs
        self._decides = decides([happening.op for happening in trace.happenings])
        self.is_large = sum(trace.parameters.values()) > MOST_DOUBLED

    def is_exact(self, groups: Sequence[ChannelGroup], plan: Plan) -> bool:
        """Whether cutting equals masking."""
        try:
            error = self._error_of(groups, plan, None)
            if self.is_large or not SURE[0] < error < SURE[1]:
                return error < SURE[1]
            return self._error_of(groups, plan, torch.float64) <= TOLERANCE
        except Exception:  # a part of a cut that ran may meet a number that depends on the rest
            return False

    def _error_of(self, groups: Sequence[ChannelGroup], plan: Plan, dtype: torch.dtype | None) -> float:
        decisions, nothing = Decisions(), nullcontext()
        expected = self._outputs_of(masked, groups, plan, dtype, decisions.making() if self._decides else nothing)
        if self._model is not self._dull and not _tells(expected):
            self._model = self._dull  # it was made for its own weights
            return self._error_of(groups, plan, dtype)
        found = self._outputs_of(slim, groups, plan, dtype, decisions.repeating() if self._decides else nothing)
        if len(expected) != len(found):
            return float("inf")
        return max((relative_error(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)

    def _outputs_of(
        self,
        build: Callable[..., nn.Module],
        groups: Sequence[ChannelGroup],
        plan: Plan,
        dtype: torch.dtype | None,
        deciding: AbstractContextManager[None],
    ) -> list[Tensor]:
        network = build(self._model, groups, plan).to(dtype)
        with torch.no_grad(), evaluating(network), plain_attention(), deciding:
            outputs = network(*tree_map(lambda leaf: _in_precision(leaf, dtype), tuple(self._inputs)))
        return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _tells(outputs: Sequence[Tensor]) -> bool:
    """Whether there is something in all of it that can be compared."""
    return all(output.numel() and bool(output.isfinite().all()) for output in outputs)


def vivid(model: nn.Module) -> nn.Module:
    """A copy of `model` without parameters that are all the same; it shares those that vary."""
    return clone(model, lambda name, old: like(old, _varied(name, old)) if _is_even(old) else old)


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
