"""ONNX forms of operators that torch's exporter has none for; the random networks of the tests found them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from onnxscript import opset18 as op


def adaptive_max_pool2d(self: Any, output_size: Sequence[int]) -> tuple[Any, Any]:
    """`aten.adaptive_max_pool2d` of images with known height and width: largest values, and where in the plane.

    As in PyTorch, region i of n along an extent goes from floor(i * extent / n) to ceil((i + 1) * extent / n).
    """
    height, width = (int(extent) for extent in self.shape[-2:])
    values, indices = [], []
    for top, bottom in _regions(height, output_size[0]):
        line = [_max_of_region(self, top, bottom, left, right, width) for left, right in _regions(width, output_size[1])]
        values.append(op.Concat(*(value for value, _ in line), axis=-1))
        indices.append(op.Concat(*(index for _, index in line), axis=-1))
    return op.Concat(*values, axis=-2), op.Concat(*indices, axis=-2)


def _max_of_region(images: Any, top: int, bottom: int, left: int, right: int, width: int) -> tuple[Any, Any]:
    """The largest value of one region and its place, row * width + column; both (batch, channels, 1, 1)."""
    region = op.Slice(images, _int_constant(top, left), _int_constant(bottom, right), _int_constant(2, 3))
    rows, columns = bottom - top, right - left
    value, index = op.MaxPool(region, kernel_shape=[rows, columns])
    inside = op.Mod(index, _int_constant(rows * columns))  # ONNX counts through the whole batch
    row, column = op.Div(inside, _int_constant(columns)), op.Mod(inside, _int_constant(columns))
    return value, op.Add(op.Mul(op.Add(row, _int_constant(top)), _int_constant(width)), op.Add(column, _int_constant(left)))


def _regions(extent: int, count: int) -> list[tuple[int, int]]:
    return [(i * extent // count, -(-(i + 1) * extent // count)) for i in range(count)]


def _int_constant(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.adaptive_max_pool2d.default: adaptive_max_pool2d,
}
