"""Does the exported graph compute what the PyTorch model does?

Both see the same images, real ones and noise, at several batch sizes: a branch that depends on the
batch, or a batch that was frozen into the graph, shows only there. A file that fails is set aside
under the suffix `.set_aside`, so that nobody deploys it by accident.

The error is relative to the range of the outputs: max |a - b| / max |b| over one batch, where a is the
exported graph's output and b the model's. A logit near zero then does not count as a large error.
Graphs in fp16 and bf16 are judged by `casting.emulate_rounding`: ONNX Runtime's CPU kernels would compute
fp16 in float32, where nothing overflows, and have no bf16 at all. What was run is in `Parity.ran`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn

from passdeploy.errors import ParityError, UsageError, first_line
from passdeploy.export.casting import emulate_rounding
from passdeploy.export.ort_session import open_session
from passdeploy.export.precision import CAST_PRECISIONS, LIMITS, Limits
from passdeploy.models.modes import evaluating

_SMALLEST_RANGE = 1e-30  # outputs that are all zero have no range to be relative to


@dataclass(frozen=True)
class ReferenceBatch:
    """One batch, and what the model says of it."""

    images: Tensor  # (batch, 3, height, width)
    expected: Tensor  # (batch, classes)
    labels: Tensor | None  # (batch,)
    counted: int  # so many images at the start are real and in no other trial: they count for agreement and accuracy
    is_real: bool


@dataclass(frozen=True)
class Reference:
    """The PyTorch model's answers, computed once for all the artifacts made of it."""

    batches: tuple[ReferenceBatch, ...]
    batch_sizes: tuple[int, ...]
    top1: float | None  # accuracy of the model on the labelled images


@dataclass(frozen=True)
class Parity:
    """How close an exported graph is to its model, over all images compared."""

    max_abs_error: float
    max_rel_error: float  # relative to the largest output of the batch
    max_rel_error_real: float | None  # the same without the noise; None where there was nothing but noise
    top1_agreement: float  # share of the real images with the same answer (of noise, where there is nothing else)
    top1: float | None  # accuracy of the graph on the labelled images; None without labels
    reference_top1: float | None  # and of the model
    images: int
    real_images: int
    batch_sizes: tuple[int, ...]
    ran: str = "onnxruntime on the CPU"

    @property
    def top1_drop(self) -> float | None:
        """How much of the model's accuracy is lost, a fraction; None without labels."""
        return None if self.top1 is None or self.reference_top1 is None else self.reference_top1 - self.top1

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in an artifact's facts."""
        return {**asdict(self), "batch_sizes": list(self.batch_sizes), "top1_drop": self.top1_drop}


def compute_reference(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 2, 32),
    is_real: bool = True,
    seed: int = 0,
) -> Reference:
    """What `model`, in eval mode, says of real images and of as many of noise at every batch size.

    Args:
        model: on the CPU; left as it was.
        images: real images, shape (n, 3, height, width); at the largest batch size every one is used.
        labels: of the images, shape (n,).
        batch_sizes: each is tried on real images and on noise with the mean and deviation of the real ones.
        is_real: False where `images` are noise too: then agreement and accuracy do not count.
        seed: of the noise.
    """
    if len(images) == 0:
        raise UsageError("parity needs at least one image to compare on.")
    batches = []
    with torch.no_grad(), evaluating(model):
        for batch, indices, counted in _batches(images.detach().cpu().float(), batch_sizes, seed):
            known = labels[indices] if labels is not None and indices is not None else None
            batches.append(ReferenceBatch(batch, model(batch), known, counted, is_real and indices is not None))
    right = [_count_correct(batch.expected, batch) for batch in batches if batch.labels is not None]
    top1 = sum(right) / len(images) if labels is not None else None
    return Reference(tuple(batches), tuple(batch_sizes), top1)


def check_parity(
    onnx_path: Path,
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 2, 32),
    tolerance: float = LIMITS["fp32"].rel_error,
    seed: int = 0,
) -> Parity:
    """Compare a float32 ONNX file in ONNX Runtime (CPU) with `model` in eval mode; arguments as for `compute_reference`.

    Raises:
        ParityError: the largest relative error is above `tolerance`, or the graph does not run.
        MissingExtra: onnxruntime is not installed.
    """
    reference = compute_reference(model, images, labels, batch_sizes=batch_sizes, seed=seed)
    return require_parity(onnx_path, reference, "fp32", replace(LIMITS["fp32"], rel_error=tolerance))


def require_parity(
    onnx_path: Path, reference: Reference, precision: str, limits: Limits, *, final: Path | None = None
) -> Parity:
    """Compare a file with the reference; one that fails is renamed to `<name>.set_aside`.

    Args:
        onnx_path: the file.
        reference: the model's answers.
        precision: of the file.
        limits: what it must keep.
        final: what it is to be called; None: what it is called.

    Raises:
        ParityError: it does not run, or is further away than `limits` allow.
        MissingExtra: onnxruntime is not installed.
    """
    try:
        for session, ran in _open_sessions(onnx_path, precision):
            parity = measure_parity(session, reference, ran=ran)
            problem = gate_problem(parity, limits)
            del session  # an open file cannot be renamed everywhere
            if problem is not None:
                break
    except ParityError as error:
        problem = str(error)
    if problem is not None:
        raise set_aside(onnx_path, problem, final)
    return parity


def _open_sessions(onnx_path: Path, precision: str) -> Iterator[tuple[Any, str]]:
    """What runs a file here, and what that is called: the file itself, and a cast one with every value rounded."""
    if precision == "fp8":
        yield open_unoptimised(onnx_path), f"{Parity.ran}, its optimiser off"
    elif precision != "bf16":  # which has no kernels on a CPU
        yield open_session(onnx_path, threads=torch.get_num_threads()), Parity.ran
    if precision in CAST_PRECISIONS:
        words = "onnxruntime on the CPU, in float32 with every value rounded where it is stored"
        yield open_rounding_emulation(onnx.load(onnx_path)), words


def measure_parity(session: Any, reference: Reference, *, ran: str = Parity.ran) -> Parity:
    """Run every trial through an ONNX Runtime session.

    Raises:
        ParityError: it does not run, or answers in another shape.
    """
    name = session.get_inputs()[0].name
    max_abs, max_rel, max_rel_real = 0.0, 0.0, 0.0
    agreeing, agreeing_noise, right = 0, 0, 0
    for batch in reference.batches:
        try:
            (found,) = session.run(None, {name: batch.images.numpy()})
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise ParityError(f"does not run at batch {len(batch.images)}: {first_line(error)}") from error
        actual = torch.from_numpy(found)
        if actual.shape != batch.expected.shape:
            shapes = f"{tuple(actual.shape)} where the model returns {tuple(batch.expected.shape)}"
            raise ParityError(f"returns shape {shapes}")
        absolute, relative = errors_between(actual, batch.expected)
        max_abs, max_rel = max(max_abs, absolute), max(max_rel, relative)
        same = actual.argmax(1) == batch.expected.argmax(1)
        if batch.is_real:
            max_rel_real = max(max_rel_real, relative)
            agreeing += int(same[: batch.counted].sum())
            right += _count_correct(actual, batch)
        else:
            agreeing_noise += int(same.sum())
    seen = sum(len(batch.images) for batch in reference.batches)
    real = sum(batch.counted for batch in reference.batches if batch.is_real)
    return Parity(
        max_abs_error=max_abs,
        max_rel_error=max_rel,
        max_rel_error_real=max_rel_real if real else None,
        top1_agreement=agreeing / real if real else agreeing_noise / seen,
        top1=right / real if reference.top1 is not None and real else None,
        reference_top1=reference.top1 if real else None,
        images=seen,
        real_images=real,
        batch_sizes=reference.batch_sizes,
        ran=ran,
    )


def gated_error(parity: Parity, limits: Limits) -> float:
    """The relative error that `limits` are about: without the noise, where that lies outside what was calibrated."""
    if limits.counts_noise or parity.max_rel_error_real is None or not parity.max_rel_error < inf:
        return parity.max_rel_error
    return parity.max_rel_error_real


def gate_problem(parity: Parity, limits: Limits) -> str | None:
    """What `limits` do not allow, or None. One image more or less decides nothing: a share may miss by one.

    Agreement and accuracy count on real images only; on noise the answers of a network are close to a draw.
    """
    error = gated_error(parity, limits)
    if not error <= limits.rel_error:
        return f"differs from the PyTorch model by {error:.1e} (limit {limits.rel_error:.0e})"
    if not parity.real_images:
        return None
    one = 1 / parity.real_images + 1e-9
    if parity.top1_agreement + one < limits.top1_agreement:
        share = f"{parity.top1_agreement:.2%} of {parity.real_images} images (at least {limits.top1_agreement:.1%})"
        return f"gives the PyTorch model's answer on only {share}"
    if parity.top1_drop is not None and parity.top1_drop > max(limits.top1_drop, one) + 1e-9:
        accuracy = f"{parity.reference_top1:.2%} to {parity.top1:.2%}"
        return f"loses {parity.top1_drop:.2%} of top-1, {accuracy} (at most {limits.top1_drop:.2%})"
    return None


def open_rounding_emulation(model: ModelProto) -> Any:
    """A session that computes what a cast graph does, rounding included; see `casting.emulate_rounding`."""
    return open_unoptimised(emulate_rounding(model))  # optimisations could drop the very casts that round


def open_unoptimised(source: Path | ModelProto) -> Any:
    """A session that runs a graph as written: ONNX Runtime's optimiser (1.32) makes fp8 graphs compute nonsense."""
    return open_session(source, threads=torch.get_num_threads(), is_optimised=False)


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


def rejected_path(path: Path) -> Path:
    """What a file is called that failed its gate."""
    return path.with_name(path.name + ".rejected")


def set_aside(path: Path, what: str, final: Path | None = None) -> ParityError:
    """Set the file aside, beside where it lies or where it was to go, and say why."""
    final = final or path
    aside = rejected_path(final)
    path.replace(aside)
    return ParityError(f"{final.name} {what}.\nThe file was set aside as {aside}; do not deploy it.")


def _count_correct(answers: Tensor, batch: ReferenceBatch) -> int:
    """How many of the trial's fresh images are answered with their label."""
    if batch.labels is None:
        return 0
    return int((answers.argmax(1) == batch.labels)[: batch.counted].sum())


def _batches(images: Tensor, sizes: Sequence[int], seed: int) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """Images, which real ones they are (None: noise), and how many of these are new. At the largest size: all."""
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
