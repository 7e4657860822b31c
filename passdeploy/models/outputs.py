"""Find the tensors, arrays and numbers in whatever a network returns: containers, dataclasses, result objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_NUMBERS = (bool, int, float, complex, np.number, np.bool_)
_MOST_DEPTH = 8  # of objects inside of objects


def tensors_in(outputs: Any) -> list[Tensor]:
    """List the tensors in `outputs`, in order, each as often as it is returned."""
    return [value for value in _values_in(outputs, 0, set()) if isinstance(value, Tensor)]


def comparable_in(outputs: Any) -> list[Tensor]:
    """List what can be compared in `outputs` as tensors: tensors, arrays of numbers, and numbers or truth values.

    Numbers in a row become one tensor: each by itself could be close to zero, and a relative error mean nothing.
    """
    found: list[Tensor] = []
    numbers: list[Any] = []
    for value in [*_values_in(outputs, 0, set()), None]:
        if isinstance(value, _NUMBERS):
            numbers.append(value)
            continue
        if numbers:
            found.append(torch.as_tensor(np.array(numbers)))
            numbers = []
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            found.append(torch.as_tensor(value.copy()))
    return found


def _values_in(value: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, (Tensor, np.ndarray, *_NUMBERS)):
            yield leaf
        elif depth < _MOST_DEPTH and id(leaf) not in seen:
            seen.add(id(leaf))
            for part in _parts_of(leaf):
                yield from _values_in(part, depth + 1, seen)


def _parts_of(value: Any) -> list[Any]:
    """List the fields of an object that is no container known to torch's pytrees; nothing of a function or a class."""
    if value is None or isinstance(value, str | bytes | type) or callable(value):
        return []
    if is_dataclass(value):
        return [getattr(value, field.name, None) for field in fields(value)]
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | Set):
        return list(value)
    slots = [name for kind in type(value).__mro__ for name in _slots_of(kind)]
    return [*vars(value).values()] if hasattr(value, "__dict__") else [getattr(value, name, None) for name in slots]


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
