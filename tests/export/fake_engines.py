"""A fake TensorRT whose engines compute with PyTorch on the CPU, on memory bound by address as TensorRT does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

INPUT, OUTPUT = "images", "logits"


class Context:
    """A fake execution context of a `FakeEngine`."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine, self._shape, self._addresses = engine, (), dict[str, int]()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self._shape[0], self._engine.outputs)

    def infer_shapes(self) -> list[str]:
        return []

    def execute_async_v3(self, stream: int) -> bool:
        images = _memory(self._addresses[INPUT], self._shape)
        with torch.no_grad():
            _memory(self._addresses[OUTPUT], self.get_tensor_shape(OUTPUT)).copy_(self._engine.compute(images))
        return True


class FakeEngine:
    """A fake engine that takes float32 images of one shape, 1 to 32 at a time.

    Args:
        compute: (batch, *image) -> (batch, outputs).
        image: channels, height, width.
        outputs: numbers per image.
    """

    num_io_tensors = 2

    def __init__(self, compute: Callable[[Tensor], Tensor], image: tuple[int, ...], outputs: int) -> None:
        self.compute, self.image, self.outputs = compute, image, outputs

    def get_tensor_name(self, index: int) -> str:
        return (INPUT, OUTPUT)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == INPUT else "out"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self.image) if name == INPUT else (-1, self.outputs)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [(size, *self.image) for size in (1, 8, 32)]

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="FLOAT")

    def create_execution_context(self) -> Context:
        return Context(self)


FAKE_TRT: Any = SimpleNamespace(__version__="11.4.0.106", TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"))


def _memory(address: int, shape: tuple[int, ...]) -> Tensor:
    """View float32 numbers at an address as a tensor."""
    count = int(np.prod(shape))
    numbers = np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))
    return torch.from_numpy(numbers).view(shape)
