"""Networks in float64, where rounding hides next to nothing, and those that compute in narrower types all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MAX_FLOAT64_PARAMETERS = 100_000_000  # larger networks are compared in their own type alone


def is_large(network: nn.Module) -> bool:
    """True for a network that is too large to be compared in float64."""
    return sum(parameter.numel() for parameter in network.parameters()) > MAX_FLOAT64_PARAMETERS


def to_float64_(network: nn.Module) -> nn.Module:
    """Convert parameters and buffers to float64, complex ones to complex128: `network.to` makes these real."""
    network._apply(_widened)
    return network


def in_float64(inputs: Sequence[Any]) -> list[Any]:
    """Convert the floating-point tensors among a network's arguments."""
    return [tree_map(_widened, item) for item in inputs]


def _widened(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_complex():
        return leaf.to(torch.complex128)
    return leaf.to(torch.float64) if leaf.is_floating_point() else leaf


class NarrowingWatch(TorchDispatchMode):
    """Watch for operations that make narrower floats of float64, such as `x.float()` in a norm."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.was_seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run any operation, and look at the types of what it takes and returns."""
        result = func(*args, **(kwargs or {}))
        if not self.was_seen and torch.float64 in _float_types((args, kwargs)):
            self.was_seen = bool(_float_types(result) - {torch.float64})
        return result


def _float_types(values: Any) -> set[torch.dtype]:
    """Collect the types of floating-point numbers among tensors."""
    return {leaf.dtype for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()}
