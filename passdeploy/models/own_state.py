"""Tell whether a network has changed when it ran, beyond the statistics of its batch norms."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as _Norm

from passdeploy.models.cloning import modules_by_name, named_state
from passdeploy.models.modes import is_of_library

_OWN_TABLES = ("_parameters", "_buffers", "_modules")


class OwnState:
    """What a network holds at one time: values of parameters and buffers, and the attributes of its modules."""

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
        pairs = zip(attributes, self._attributes, strict=True)
        return any(one[0] != two[0] or one[1] is not two[1] or one[2] != two[2] for one, two in pairs)


def _values_in(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, without the statistics of batch norms of known libraries."""
    norms = {name for name, module in modules_by_name(network) if isinstance(module, _Norm) and is_of_library(module)}
    for name, tensor in named_state(network):
        is_own = isinstance(tensor, nn.Parameter) or name.rpartition(".")[0] not in norms
        if is_own and tensor.layout == torch.strided:
            yield name, tensor


def _attributes_of(network: nn.Module) -> Iterator[tuple[str, Any, int]]:
    """Yield name, value and state of every attribute."""
    for name, module in modules_by_name(network):
        for attribute, value in vars(module).items():
            if attribute not in _OWN_TABLES:
                yield f"{name}.{attribute}", value, _state_of(value)


def _state_of(value: Any) -> int:
    """Return the length of a container, or how often a tensor was changed in place; 0 for anything else."""
    if isinstance(value, list | dict | set | deque):
        return len(value)
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
