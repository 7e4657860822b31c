"""Tell whether a network has changed when it ran, beyond the statistics of its batch norms."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as _Norm

from passdeploy.models.cloning import modules_by_name, named_state
from passdeploy.models.modes import is_of_library

_OWN_TABLES = ("_parameters", "_buffers", "_modules")
_MOST_DEPTH = 3  # of containers and objects inside of others
_PLAIN = (bool, int, float, complex, str, bytes)


class OwnState:
    """State of a network at one time: values of parameters and buffers, and the attributes of its modules."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._values = {name: tensor.detach().clone() for name, tensor in _values_in(network)}
        self._attributes = list(_attributes_of(network))

    def has_changed(self) -> bool:
        """True if a value or an attribute is another one now, or a container has another length."""
        now = dict(_values_in(self._network))
        if now.keys() != self._values.keys():
            return True
        if any(now[name].shape != old.shape or not torch.equal(now[name], old) for name, old in self._values.items()):
            return True
        attributes = list(_attributes_of(self._network))
        if len(attributes) != len(self._attributes):
            return True
        return not all(map(_is_same, attributes, self._attributes))


def _values_in(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, without the statistics of batch norms of known libraries."""
    norms = {name for name, module in modules_by_name(network) if isinstance(module, _Norm) and is_of_library(module)}
    for name, tensor in named_state(network):
        is_own = isinstance(tensor, nn.Parameter) or name.rpartition(".")[0] not in norms
        if is_own and tensor.layout == torch.strided:
            yield name, tensor


def _attributes_of(network: nn.Module) -> Iterator[Any]:
    """Yield names and values of all attributes."""
    for _, module in modules_by_name(network):
        for attribute, value in vars(module).items():
            if attribute not in _OWN_TABLES:
                yield attribute
                yield from _parts_of(value, _MOST_DEPTH)


def _parts_of(value: Any, depth: int) -> Iterator[Any]:
    """Yield a value, and what tells whether it was changed in place: of containers and plain objects their parts."""
    yield value.tobytes() if isinstance(value, np.ndarray) else value
    if isinstance(value, Tensor):
        yield 0 if value.is_inference() else value._version
    elif isinstance(value, list | tuple | deque | dict | set) and depth:
        yield len(value)
        for part in [] if isinstance(value, set) else value.values() if isinstance(value, dict) else value:
            yield from _parts_of(part, depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value):
        for name, part in vars(value).items():
            yield name
            yield from _parts_of(part, depth - 1)


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, _PLAIN) and type(one) is type(other) and one == other)
