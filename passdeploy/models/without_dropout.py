"""Run networks in training mode without dropout, which treats all channels alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from passdeploy.models.modes import drops_at_random, is_of_library

_DROPOUT = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
_PLACES: dict[Callable[..., Any], int] = {  # of the argument dropout_p
    F.scaled_dot_product_attention: 4,
    F.multi_head_attention_forward: 10,
}


@contextmanager
def without_dropout(network: nn.Module) -> Iterator[None]:
    """Switch off dropout and stochastic depth of known libraries in a network in training mode.

    What is merely called so may do anything, and stays.
    """
    for module in network.modules():
        if drops_at_random(module) and is_of_library(module):
            module.training = False
    with _WithoutDropout():
        yield


class _WithoutDropout(TorchFunctionMode):
    """The mode in which functions for dropout return what they are given, and attention drops nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call any function."""
        if func in _DROPOUT and args:
            return args[0]
        given, place = dict(kwargs or {}), _PLACES.get(func)
        if place is not None and len(args) > place:
            args = (*args[:place], 0.0, *args[place + 1 :])
        elif place is not None:
            given["dropout_p"] = 0.0
        return func(*args, **given)
