"""Run networks in training mode without dropout, which treats all channels alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from passdeploy.models.modes import drops_at_random, is_of_library
from passdeploy.runtime.seeds import generator, seeded_python_and_numpy

_SHAPES = ((4, 8, 6, 6), (4, 6, 8))  # of images, and of sequences
_TRIES = 8  # two of each draw

_DROPOUT = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
_PLACES: dict[Callable[..., Any], int] = {  # of the argument dropout_p
    F.scaled_dot_product_attention: 4,
    F.multi_head_attention_forward: 10,
}


@contextmanager
def without_dropout(network: nn.Module) -> Iterator[None]:
    """Switch off dropout and stochastic depth in a network in training mode.

    Where their code is the user's own, they are tried first: what is merely called so may do anything.
    """
    for module in network.modules():
        if drops_at_random(module) and (is_of_library(module) or _only_drops(module)):
            module.training = False
    with _WithoutDropout():
        yield


def _only_drops(module: nn.Module) -> bool:
    """True if a module sets values to zero and scales all others alike, wherever it is and whatever the values are."""
    try:
        return all(_drops_alike(copy.deepcopy(module), shape) for shape in _SHAPES)
    except Exception:  # any kind: it is the user's code
        return False


def _drops_alike(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Run a module in training mode twice, on other values and with the same draws, and compare what it keeps."""
    shares = []
    for key in range(_TRIES):
        values = torch.rand(shape, generator=generator("drops", key // 2, key % 2)) + 1
        with torch.no_grad(), seeded_python_and_numpy(key // 2), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key // 2)
            shares.append(module.train()(values.clone()) / values)
    kept = [share != 0 for share in shares]
    scales = [share[there] for share, there in zip(shares, kept, strict=True)]
    return (
        all(torch.equal(one, other) for one, other in zip(kept[::2], kept[1::2], strict=True))
        and all(torch.allclose(scale, scale[:1].expand_as(scale)) for scale in scales)
        and all(share.shape == values.shape for share in shares)
    )


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
