"""Reductions over channels (mean, sum, norm, variance, maximum, softmax) restricted to the channels that a plan keeps.

A mean, sum, norm, variance, maximum or softmax over channels of which some are removed is, in the masked network, that
of the others: that is what the slim network will compute. A norm is found by its scale parameter (masked_norms.py); a
reduction has none, so it is found by the module that calls it and the number of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from passdeploy.models.function_calls import CallKey, FunctionCallTracker
from passdeploy.models.reduction_calls import MAX_FUNCTIONS, MEAN_FUNCTIONS, REDUCTION_FUNCTIONS, REMOVING_FUNCTIONS

KeptAlong = tuple[int, Tensor]  # a dimension counted from the last, and True for each of its places that exists


class RestrictedStatistics(TorchFunctionMode):
    """Mode in which the given reductions go over the channels that exist only.

    Args:
        tracker: of the network that runs.
        existing: which statistics, and over which channels they go.
    """

    def __init__(self, tracker: FunctionCallTracker, existing: Mapping[CallKey, Sequence[KeptAlong]]) -> None:
        super().__init__()
        self._tracker, self._existing = tracker, existing

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call any function of torch, restricted where it is known."""
        known = self._existing.get(self._tracker.next_key()) if func in REDUCTION_FUNCTIONS else None
        if known is None:
            return func(*args, **(kwargs or {}))
        given = dict(kwargs or {})
        x = args[0] if args else given.pop("input")
        if func in REMOVING_FUNCTIONS:
            for dim, exists in known:
                x = x.index_select(dim, exists.nonzero()[:, 0].to(x.device))
            return func(x, *args[1:], **given)
        for dim, exists in known:
            gone = ~exists.to(x.device).view(-1, *[1] * (-1 - dim))
            x = x.masked_fill(gone, -torch.inf if func in MAX_FUNCTIONS else 0.0)
        found = func(x, *args[1:], **given)
        if func in MEAN_FUNCTIONS:  # of as many as there were: the others count for nothing
            for _, exists in known:
                found = found * (exists.numel() / int(exists.sum()))
        return found
