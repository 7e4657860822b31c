"""A dictionary of what is known about tensors while they live."""

from __future__ import annotations

from typing import Generic, TypeVar
from weakref import ref

from torch import Tensor

Known = TypeVar("Known")


class WeakTensorDict(Generic[Known]):
    """A dictionary keyed by tensor identity that keeps no tensor alive.

    An entry counts only while its weak reference is the tensor asked for, since Python reuses ids.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[ref[Tensor], Known]] = {}

    def __setitem__(self, tensor: Tensor, known: Known) -> None:
        self._known[id(tensor)] = ref(tensor), known

    def get(self, tensor: Tensor) -> Known | None:
        """Return the value stored for `tensor`, or None."""
        entry = self._known.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def forget(self, tensor: Tensor) -> None:
        """Remove the entry of `tensor`, if there is one."""
        self._known.pop(id(tensor), None)
