"""What is known of tensors, by identity."""

from __future__ import annotations

from typing import Generic, TypeVar
from weakref import ref

from torch import Tensor

Known = TypeVar("Known")


class TensorTable(Generic[Known]):
    """What is known of tensors for as long as they live; a plain dictionary that looks twice."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[ref[Tensor], Known]] = {}

    def __setitem__(self, tensor: Tensor, known: Known) -> None:
        self._known[id(tensor)] = ref(tensor), known

    def get(self, tensor: Tensor) -> Known | None:
        """What is known of `tensor`, if anything is."""
        found = self._known.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def forget(self, tensor: Tensor) -> None:
        """Nothing is known of it any more."""
        self._known.pop(id(tensor), None)
