"""Copies of networks: as `copy.deepcopy` makes them, with other tensors where wanted, and quicker.

A network is hundreds of modules, each with two dozen attributes, most of them empty dictionaries of hooks that
`copy.deepcopy` takes apart one by one. What is plain is copied here; what a class copies in a way of its own, it does.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

_AS_THEY_ARE = frozenset({bool, int, float, complex, str, bytes, type(None)})
_DICTIONARIES = frozenset({dict, OrderedDict})
_OWN_WAYS = ("__new__", "__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")
_HARMLESS = (nn.modules.conv._ConvNd.__setstate__, nn.modules.batchnorm._NormBase.__setstate__)  # of old files


def clone(model: Network, instead: Callable[[str, Tensor], Tensor]) -> Network:
    """A copy of `model` whose parameters and buffers are what `instead` makes of them.

    Args:
        model: left as it is. Modules and tensors that it shares are shared in the copy.
        instead: name and tensor -> what takes its place, which may be the same tensor.
    """
    copied: Network = _cloned(model, {id(old): instead(name, old) for name, old in named_state(model)})
    return copied


def named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once, with their first names."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _cloned(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy; `memo` has for the id of an object what stands in its place."""
    kind: Any = type(value)
    if kind in _AS_THEY_ARE:
        return value
    if id(value) in memo:
        return memo[id(value)]
    copied: Any
    if kind is set and not value:
        memo[id(value)] = copied = set()
        return copied
    if kind in _DICTIONARIES:
        memo[id(value)] = copied = kind()
        for key, held in value.items():
            copied[key] = _cloned(held, memo)
        return copied
    if isinstance(value, nn.Module) and _is_plain(kind):
        memo[id(value)] = copied = kind.__new__(kind)
        attributes = copied.__dict__
        for name, held in value.__dict__.items():
            attributes[name] = held if type(held) in _AS_THEY_ARE else _cloned(held, memo)
        return copied
    return copy.deepcopy(value, memo)


@cache
def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether modules of this class are their attributes and nothing else."""
    return all(getattr(kind, way, None) in (getattr(nn.Module, way, None), *_HARMLESS) for way in _OWN_WAYS)
