"""ONNX translations of PyTorch operators that torch's exporter does not support: adaptive max pooling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from onnxscript import opset18 as op


def adaptive_max_pool2d(self: Any, output_size: Sequence[int]) -> tuple[Any, Any]:
    """Translate `aten.adaptive_max_pool2d` for images of known height and width: largest values and their indices.

    An index is row * width + column, as in PyTorch. Region i of n along an extent goes from
    floor(i * extent / n) to ceil((i + 1) * extent / n).
    """
    height, width = (int(extent) for extent in self.shape[-2:])
    values, indices = [], []
    for top, bottom in _regions(height, output_size[0]):
        columns = _regions(width, output_size[1])
        row = [_max_of_region(self, top, bottom, left, right, width) for left, right in columns]
        values.append(op.Concat(*(value for value, _ in row), axis=-1))
        indices.append(op.Concat(*(index for _, index in row), axis=-1))
    return op.Concat(*values, axis=-2), op.Concat(*indices, axis=-2)


def _max_of_region(images: Any, top: int, bottom: int, left: int, right: int, width: int) -> tuple[Any, Any]:
    """Return the largest value of one region and its index, row * width + column; both (batch, channels, 1, 1)."""
    region = op.Slice(images, _int_constant(top, left), _int_constant(bottom, right), _int_constant(2, 3))
    rows, columns = bottom - top, right - left
    value, index = op.MaxPool(region, kernel_shape=[rows, columns])
    in_region = op.Mod(index, _int_constant(rows * columns))  # ONNX counts indices through the whole batch
    row, column = op.Div(in_region, _int_constant(columns)), op.Mod(in_region, _int_constant(columns))
    row_start = op.Mul(op.Add(row, _int_constant(top)), _int_constant(width))
    return value, op.Add(row_start, op.Add(column, _int_constant(left)))


def _regions(extent: int, count: int) -> list[tuple[int, int]]:
    """List the (start, end) of `count` pooling regions along an extent of pixels."""
    return [(i * extent // count, -(-(i + 1) * extent // count)) for i in range(count)]


def _int_constant(*values: int) -> Any:
    """Make a constant tensor of int64 values."""
    return op.Constant(value_ints=list(values))


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.adaptive_max_pool2d.default: adaptive_max_pool2d,
}
