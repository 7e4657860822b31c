"""Answers that exported files are compared with: those of the PyTorch model, to real images and to noise.

They are computed once for all files made from a model, at several batch sizes, since a branch that depends on the
batch, or a fixed batch in a graph, shows only there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from passdeploy.errors import UsageError
from passdeploy.export.batches import cut_into_batches
from passdeploy.models.modes import evaluating

PYTORCH, ONNX_FILE = "the PyTorch model", "its ONNX file"  # whose answers a file is compared with


@dataclass(frozen=True)
class ReferenceBatch:
    """One batch of images and the outputs expected for it."""

    images: Tensor  # (batch, 3, height, width)
    expected: Tensor  # (batch, classes)
    labels: Tensor | None  # (batch,)
    counted: int  # number of images, from the first on, that count for agreement and accuracy: each real one only once
    is_real: bool  # False: noise

    def count_correct(self, outputs: Tensor) -> int:
        """Count the counted images whose top-1 class in `outputs` is their label; 0 without labels."""
        if self.labels is None:
            return 0
        return int((outputs.argmax(1) == self.labels)[: self.counted].sum())


@dataclass(frozen=True)
class Reference:
    """The PyTorch model's outputs on all batches, computed once for all artifacts made from it."""

    batches: tuple[ReferenceBatch, ...]
    batch_sizes: tuple[int, ...]
    top1: float | None  # accuracy of the model on the labelled images
    answered_by: str = PYTORCH  # PYTORCH or ONNX_FILE

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Return (3, height, width)."""
        return tuple(self.batches[0].images.shape[1:])

    def at(self, size: int) -> Reference:
        """Return the batches of one of the sizes alone."""
        return replace(self, batches=tuple(one for one in self.batches if len(one.images) == size), batch_sizes=(size,))


def compute_reference(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 2, 32),
    is_real: bool = True,
    seed: int = 0,
) -> Reference:
    """Run `model` in eval mode on real images and on noise, at every batch size.

    Args:
        model: on the CPU; not changed.
        images: real images, shape (n, 3, height, width); at the largest batch size every one is used.
        labels: of the images, shape (n,).
        batch_sizes: each gets a batch of real images, and one of noise with their mean and standard deviation.
        is_real: False if `images` are noise too, so that agreement and accuracy do not count.
        seed: of the noise.
    """
    if len(images) == 0:
        raise UsageError("parity needs at least one image to compare on.")
    batches = []
    with torch.no_grad(), evaluating(model):
        for inputs, indices, counted in _make_batches(images.detach().cpu().float(), batch_sizes, seed):
            known = labels[indices] if labels is not None and indices is not None else None
            batches.append(ReferenceBatch(inputs, model(inputs), known, counted, is_real and indices is not None))
    correct = [batch.count_correct(batch.expected) for batch in batches if batch.labels is not None]
    top1 = sum(correct) / len(images) if labels is not None else None
    return Reference(tuple(batches), tuple(batch_sizes), top1)


def reference_from_answers(
    images: Tensor,
    answers: Tensor,
    labels: Tensor | None = None,
    *,
    batch_sizes: Sequence[int],
    is_real: bool = True,
    answered_by: str = PYTORCH,
) -> Reference:
    """Make a reference of recorded answers, one for each image, without a model.

    Args:
        images: (n, 3, height, width), on the CPU.
        answers: to each of them, (n, classes).
        labels: of the images, (n,).
        batch_sizes: a batch of images is made for each; at the largest every image is used.
        is_real: False if `images` are noise.
        answered_by: whose answers they are, PYTORCH or ONNX_FILE.
    """
    batches = []
    for inputs, indices, counted in _make_batches(images, batch_sizes, seed=0):
        if indices is not None:  # the noise that is added to real images has no recorded answers
            known = None if labels is None else labels[indices]
            batches.append(ReferenceBatch(inputs, answers[indices], known, counted, is_real))
    top1 = float((answers.argmax(1) == labels).float().mean()) if labels is not None else None
    return Reference(tuple(batches), tuple(batch_sizes), top1, answered_by)


def compute_answers(model: nn.Module, images: Tensor, *, batch: int) -> Tensor:
    """Run a model in eval mode on the CPU, always on full batches, and return (n, classes); it is not changed."""
    with torch.no_grad(), evaluating(model):
        return torch.cat([model(part) for part in cut_into_batches(images, batch, usual=batch)])[: len(images)]


def _make_batches(images: Tensor, sizes: Sequence[int], seed: int) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """Yield batches of real images, and one of noise for each size: (inputs, indices of the images, counted).

    The indices are None for noise. All images are used and counted at the largest size, none is counted elsewhere.
    """
    generator = torch.Generator().manual_seed(seed)
    dims = (0, 2, 3)
    mean, std = images.mean(dims, keepdim=True), images.std(dims, keepdim=True, correction=0).clamp_min(1e-3)
    for size in sizes:
        rounds = -(-len(images) // size) if size == max(sizes) else 1
        for first in range(0, rounds * size, size):
            indices = torch.arange(first, first + size) % len(images)
            counted = max(0, min(size, len(images) - first)) if size == max(sizes) else 0
            yield images[indices].contiguous(), indices, counted
        yield torch.randn(size, *images.shape[1:], generator=generator) * std + mean, None, 0
