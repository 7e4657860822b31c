"""Does the exported graph compute what the PyTorch model does?

Both run on the same images, real ones and noise, at several batch sizes: a branch that depends on the
batch, or a batch that was frozen into the graph, shows only there. A file that fails is set aside
under the suffix `.rejected`, so that nobody deploys it by accident.

The error is relative to the range of the outputs: max |a - b| / max |b| over one batch, where a is the
exported graph's output and b the model's. A logit near zero then does not count as a large error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.errors import ParityError, UsageError
from passdeploy.export.onnx_graph import evaluating
from passdeploy.export.ort_session import first_line, open_session

_SMALLEST_RANGE = 1e-30  # outputs that are all zero have no range to be relative to


@dataclass(frozen=True)
class Parity:
    """How close an exported graph is to its model, over all images compared."""

    max_abs_error: float
    max_rel_error: float  # relative to the largest output of the batch
    top1_agreement: float  # share of images with the same arg max
    images: int
    batch_sizes: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in an artifact's facts."""
        return {**asdict(self), "batch_sizes": list(self.batch_sizes)}


def check_parity(
    onnx_path: Path,
    model: nn.Module,
    images: Tensor,
    *,
    batch_sizes: Sequence[int] = (1, 2, 32),
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Parity:
    """Compare an ONNX file in ONNX Runtime (CPU) with `model` in eval mode.

    Args:
        onnx_path: the file; renamed to `<name>.rejected` when it fails.
        model: the reference, on the CPU; left as it was.
        images: real images, shape (n, 3, height, width), normalised. Every one is used at least once.
        batch_sizes: each is tried on real images and on as many of Gaussian noise.
        tolerance: the largest `max_rel_error` that passes.
        seed: of the noise.

    Raises:
        ParityError: the largest relative error is above `tolerance`, or the graph does not run.
        MissingExtra: onnxruntime is not installed.
    """
    if len(images) == 0:
        raise UsageError("parity needs at least one real image to compare on.")
    session = open_session(onnx_path, threads=torch.get_num_threads())
    name = session.get_inputs()[0].name
    noise = torch.Generator().manual_seed(seed)
    max_abs, max_rel, agreeing, seen = 0.0, 0.0, 0, 0
    with evaluating(model):
        for inputs in _batches(images, batch_sizes, noise):
            expected = model(inputs)
            try:
                (found,) = session.run(None, {name: inputs.numpy()})
            except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
                raise _rejected(onnx_path, f"does not run at batch {len(inputs)}: {first_line(error)}") from error
            actual = torch.from_numpy(found)
            if actual.shape != expected.shape:
                shapes = f"{tuple(actual.shape)} where the model returns {tuple(expected.shape)}"
                raise _rejected(onnx_path, f"returns shape {shapes}")
            absolute, relative = errors_between(actual, expected)
            max_abs, max_rel = max(max_abs, absolute), max(max_rel, relative)
            agreeing += int((actual.argmax(1) == expected.argmax(1)).sum())
            seen += len(inputs)
    del session  # an open file cannot be renamed everywhere
    if max_rel > tolerance:
        raise _rejected(onnx_path, f"differs from the PyTorch model by {max_rel:.1e} (limit {tolerance:.0e})")
    return Parity(max_abs, max_rel, agreeing / seen, seen, tuple(batch_sizes))


def errors_between(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest absolute error, and the same relative to the largest |expected|.

    A value that is not finite on either side is an infinite error.

    >>> errors_between(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 5.0]))
    (0.5, 0.1)
    """
    if not (bool(actual.isfinite().all()) and bool(expected.isfinite().all())):
        return inf, inf
    absolute = float((actual - expected).abs().max())
    return absolute, absolute / max(_SMALLEST_RANGE, float(expected.abs().max()))


def _batches(images: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Iterator[Tensor]:
    """Real and random batches of every size; at the largest, all the real images."""
    images = images.detach().cpu().float()
    for size in sizes:
        rounds = -(-len(images) // size) if size == max(sizes) else 1
        for first in range(0, rounds * size, size):
            yield images[torch.arange(first, first + size) % len(images)].contiguous()
        yield torch.randn(size, *images.shape[1:], generator=generator)


def _rejected(path: Path, what: str) -> ParityError:
    """Set the file aside and say why."""
    aside = path.with_name(path.name + ".rejected")
    path.replace(aside)
    return ParityError(f"{path.name} {what}.\nThe file was set aside as {aside}; do not deploy it.")
