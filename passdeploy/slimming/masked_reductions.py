"""Reductions over channels (mean, sum, norm, variance, maximum, softmax) restricted to the channels that a plan keeps.

A mean, sum, norm, variance, maximum or softmax over channels of which some are removed is, in the masked network, that
of the others: that is what the slim network will compute. A norm is found by its scale parameter (masked_norms.py); a
reduction has none, so it is found by the module that calls it and the number of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from passdeploy.errors import ModelError
from passdeploy.models.function_calls import CallKey, FunctionCallTracker
from passdeploy.models.reduction_calls import MAX_FUNCTIONS, MEAN_FUNCTIONS, REDUCTION_FUNCTIONS, REMOVING_FUNCTIONS


@dataclass(frozen=True, eq=False)
class KeptAlong:
    """The places that exist along a dimension that is reduced.

    Where channels and positions were flattened into one dimension, it has another size in images of another size.
    """

    dim: int  # counted from the last
    exists: Tensor  # (size in the example,): True for each place that exists
    owners: Tensor  # (size in the example,): the number of the channel at each place

    def at(self, size: int) -> Tensor:
        """Return which places exist where the dimension has another size.

        Raises:
            ModelError: it cannot be told which channel is where.
        """
        count = len(self.exists)
        if size == count:
            return self.exists
        neighbours = gcd(*torch.unique_consecutive(self.owners, return_counts=True)[1].tolist())
        period = _period(self.owners)
        if neighbours > 1 and period == count and neighbours * size % count == 0:  # each channel with all its positions
            return self.exists[::neighbours].repeat_interleave(neighbours * size // count)
        if neighbours == 1 and period < count and size % period == 0:  # each position with all its channels
            return self.exists[:period].repeat(size // period)
        raise ModelError(
            f"a masked network reduces {count} channels at its example size, and {size} at another.\n"
            "Which of these are removed cannot be told: run it at the size at which its groups were found."
        )


def _period(owners: Tensor) -> int:
    """Return the smallest number of entries of which the others are repetitions."""
    count = len(owners)
    divisors = (number for number in range(1, count) if count % number == 0)
    return next((one for one in divisors if torch.equal(owners[one:], owners[:-one])), count)


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
            for one in known:
                x = x.index_select(one.dim, one.at(x.size(one.dim)).nonzero()[:, 0].to(x.device))
            return func(x, *args[1:], **given)
        for one in known:
            gone = ~one.at(x.size(one.dim)).to(x.device).view(-1, *[1] * (-1 - one.dim))
            x = x.masked_fill(gone, -torch.inf if func in MAX_FUNCTIONS else 0.0)
        found = func(x, *args[1:], **given)
        if func in MEAN_FUNCTIONS:  # of as many as there were: the others count for nothing
            for one in known:
                exists = one.at(x.size(one.dim))
                found = found * (exists.numel() / int(exists.sum()))
        return found
