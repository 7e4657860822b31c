"""Batches of images for exported graphs: of any size where a graph leaves it open, always full where it is fixed.

A graph with a fixed batch (`--batch 8,8,8`) runs no other size, so its last batch is filled up with the first images.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor


def fixed_batch(model: ModelProto) -> int | None:
    """Return the batch size that a graph fixes; None where it is open."""
    size: int = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    return size or None


def cut_into_batches(images: Tensor, fixed: int | None, *, usual: int) -> Iterator[Tensor]:
    """Cut images into batches that a graph takes.

    Args:
        images: (n, 3, height, width).
        fixed: the batch size that the graph fixes; None: it takes any.
        usual: the largest batch where it takes any.
    """
    size = fixed or usual
    for first in range(0, len(images), size):
        end = first + size if fixed else min(first + size, len(images))
        yield images[torch.arange(first, end) % len(images)].contiguous()


def run_in_batches(session: Any, images: Tensor, *, usual: int) -> Tensor:
    """Run images through an ONNX Runtime session, and return one answer for each, (n, classes).

    Args:
        session: takes images alone.
        images: (n, 3, height, width).
        usual: the largest batch where the graph leaves it open.
    """
    taken = session.get_inputs()[0]
    fixed = taken.shape[0] if isinstance(taken.shape[0], int) else None
    batches = cut_into_batches(images, fixed, usual=usual)
    answers = [torch.from_numpy(session.run(None, {taken.name: batch.numpy()})[0]) for batch in batches]
    return torch.cat(answers)[: len(images)]
