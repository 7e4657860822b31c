"""Layer, group and RMS norms whose statistics are taken over the channels that a plan keeps.

A layer, group or RMS norm over channels of which some are removed is, in the masked network, the norm over the others:
that is what the slim network will compute. The norm is recognised by its scale, whatever module or function calls it.
The same holds for weights that are standardised on the way (a batch norm of a parameter).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from passdeploy.models.cloning import named_state
from passdeploy.models.function_calls import CallKey, FunctionCallTracker
from passdeploy.slimming.masked_reductions import KeptAlong, RestrictedStatistics


def layer_norm(x: Tensor, kept: Tensor, scale: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    """Compute the layer norm of `x` over its last dimensions where `kept`, of their shape, is 1; zero elsewhere."""
    dims = tuple(range(x.ndim - kept.ndim, x.ndim))
    count = kept.sum()
    mean = (x * kept).sum(dims, keepdim=True) / count
    centred = (x - mean) * kept
    variance = centred.square().sum(dims, keepdim=True) / count
    normal = centred * (variance + eps).rsqrt() * scale
    return normal if shift is None else normal + shift * kept


def rms_norm(x: Tensor, kept: Tensor, scale: Tensor, eps: float | None) -> Tensor:
    """Compute the RMS norm of `x` over its last dimensions where `kept`, of their shape, is 1; zero elsewhere."""
    dims = tuple(range(x.ndim - kept.ndim, x.ndim))
    present = x * kept
    mean_square = present.square().sum(dims, keepdim=True) / kept.sum()
    return present * (mean_square + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt() * scale


def group_norm(x: Tensor, groups: int, kept: Tensor, scale: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    """Compute the group norm of `x` (batch, channels, ...) over the kept channels of each group."""
    inside = x.reshape(x.size(0), groups, kept.numel() // groups, -1)  # (batch, groups, channels of a group, positions)
    present = kept.view(1, groups, -1, 1)
    count = (present.sum(2, keepdim=True) * inside.size(3)).clamp_min(1)
    mean = (inside * present).sum((2, 3), keepdim=True) / count
    centred = (inside - mean) * present
    variance = centred.square().sum((2, 3), keepdim=True) / count
    normal = (centred * (variance + eps).rsqrt()).reshape(x.shape)
    along = (1, -1, *[1] * (x.ndim - 2))
    normal = normal * scale.view(along)
    return normal if shift is None else normal + (shift * kept).view(along)


def standardise(rows: Tensor, kept: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    """Standardise weights: rows (1, outputs, weights of one) to mean 0 and variance 1 over what is kept."""
    count = kept.sum(2, keepdim=True).clamp_min(1)
    centred = (rows - (rows * kept).sum(2, keepdim=True) / count) * kept
    normal = centred * (centred.square().sum(2, keepdim=True) / count + eps).rsqrt()
    if scale is not None:
        normal = normal * scale.view(1, -1, 1)
    return normal if shift is None else normal + shift.view(1, -1, 1) * kept


@dataclass(frozen=True)
class KeptMask:
    """Mask of a parameter of which slices were removed, built only when it is asked for."""

    shape: torch.Size
    removed: dict[int, Tensor] = field(default_factory=dict)  # dimension -> indices along it

    def to(self, like: Tensor) -> Tensor:
        """Build the mask in the parameter's shape, 1 where it is kept and 0 elsewhere; dtype and device as `like`."""
        kept = like.new_ones(self.shape)
        for dim, indices in self.removed.items():
            kept.index_fill_(dim, indices.to(kept.device), 0.0)
        return kept


class RestrictedNorms(TorchFunctionMode):
    """Mode in which norms whose scale is in `kept`, and standardised weights, use only what is kept.

    Args:
        kept: parameters and buffers, each with the part that exists: a mask, or a tensor of its shape that is 1 there.
    """

    def __init__(self, kept: Sequence[tuple[Tensor, KeptMask | Tensor]]) -> None:
        super().__init__()
        self.was_used = False  # a norm or a standardised weight was restricted
        self._of_scale = {id(parameter): exists for parameter, exists in kept}
        self._of_storage = {parameter.untyped_storage().data_ptr(): exists for parameter, exists in kept}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call any function of torch, restricted where it is known."""
        restricted = None
        if func is torch._weight_norm:
            return func(*self._without_empty_slices(*args), **(kwargs or {}))
        if (names := _ARGUMENTS.get(func)) is not None:
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            restricted = self._batch_norm(given) if func is F.batch_norm else self._norm(func, given)
        if restricted is None:
            return func(*args, **(kwargs or {}))
        self.was_used = True
        return restricted

    def _norm(self, func: Callable[..., Any], given: Mapping[str, Any]) -> Tensor | None:
        mask = self._of_scale.get(id(given.get("weight")))
        if mask is None:
            return None
        x, scale = given["input"], given["weight"]
        kept = mask.to(x)
        if func in (F.group_norm, torch.group_norm):
            return group_norm(x, given["num_groups"], kept, scale, given.get("bias"), given.get("eps", 1e-5))
        if func in (F.layer_norm, torch.layer_norm):
            return layer_norm(x, kept, scale, given.get("bias"), given.get("eps", 1e-5))
        return rms_norm(x, kept, scale, given.get("eps"))

    def _without_empty_slices(self, direction: Tensor, magnitude: Tensor, dim: int = 0) -> tuple[Tensor, Tensor, int]:
        """Fill slices of a direction that were removed with ones: their norm is divided by, their magnitude is zero."""
        mask = self._of_storage.get(direction.untyped_storage().data_ptr())
        if mask is not None and (kept := mask.to(direction)).numel() == direction.numel():
            others = [each for each in range(direction.ndim) if each != dim]
            exists = kept.reshape(direction.shape).amax(others, keepdim=True) if others else kept
            direction = direction + (1 - exists)
        return direction, magnitude, dim

    def _batch_norm(self, given: Mapping[str, Any]) -> Tensor | None:
        """Restrict a batch norm of a parameter, which standardises it; batch norms of activations stay as they are."""
        x = given["input"]
        if x.ndim != 3 or not given.get("training"):
            return None
        mask = self._of_storage.get(x.untyped_storage().data_ptr())
        if mask is None or (kept := mask.to(x)).numel() != x.numel():
            return None
        return standardise(x, kept.reshape(x.shape), given.get("weight"), given.get("bias"), given.get("eps", 1e-5))


_ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    torch.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    torch.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    torch.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
}


def restrict_norms_(
    model: nn.Module, kept: Mapping[str, KeptMask], statistics: Mapping[CallKey, Sequence[KeptAlong]]
) -> nn.Module:
    """Let `model` compute its norms and reductions over the channels that exist, whenever it is called.

    The modes are entered and left by hooks: the class stays what it is, which graph modules rely on.

    Args:
        model: changed in place.
        kept: name of a parameter or buffer -> the part of it that exists.
        statistics: other reductions over channels, each with the channels that exist.
    """
    if kept or statistics:
        restriction = _Restriction(kept, statistics)
        model.register_forward_pre_hook(restriction.enter, prepend=True)
        model.register_forward_hook(restriction.leave, always_call=True)
    return model


class _Restriction:
    """Hooks that restrict norms and reductions while a network runs."""

    def __init__(self, kept: Mapping[str, KeptMask], statistics: Mapping[CallKey, Sequence[KeptAlong]]) -> None:
        self._kept, self._statistics = kept, statistics
        self._entered: list[ExitStack] = []

    def enter(self, model: nn.Module, _: Any) -> None:
        """Enter the modes before the forward pass."""
        state, stack = dict(named_state(model)), ExitStack()
        if self._statistics:
            tracker = FunctionCallTracker()
            stack.enter_context(tracker.hooked_into(model, with_root=False))
            stack.enter_context(RestrictedStatistics(tracker, self._statistics))
        stack.enter_context(RestrictedNorms([(state[name], exists) for name, exists in self._kept.items()]))
        self._entered.append(stack)

    def leave(self, *_: Any) -> None:
        """Leave them after it, also where it failed."""
        if self._entered:
            self._entered.pop().close()
