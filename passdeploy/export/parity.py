"""Parity check: compare the outputs of an exported file with those of its PyTorch model.

Both run on the same images, see reference.py. A file that fails is renamed with the suffix `.rejected`, so that nobody
deploys it by accident.

The error is relative to the range of the outputs: max |a - b| / max |b| over one batch, where a is the
exported graph's output and b the model's. A logit near zero then does not count as a large error.
Graphs in fp16 and bf16 are run through `casting.emulate_rounding` too: ONNX Runtime's CPU kernels compute
fp16 in float32, where nothing overflows, and have no bf16 at all. `Parity.ran` names what was run.
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

from passdeploy.errors import ParityError, first_line, percent
from passdeploy.export.batches import run_in_batches
from passdeploy.export.casting import emulate_rounding
from passdeploy.export.drafts import set_aside
from passdeploy.export.ort_session import open_session
from passdeploy.export.precision import CAST_PRECISIONS, LIMITS, Limits
from passdeploy.export.reference import PYTORCH, Reference, compute_reference

_SMALLEST_RANGE = 1e-30  # outputs that are all zero have no range to be relative to


@dataclass(frozen=True)
class Parity:
    """Differences between an exported file and its model, over all images compared."""

    max_abs_error: float
    max_rel_error: float  # relative to the largest output of the batch
    max_rel_error_real: float | None  # the same without the noise; None where there was nothing but noise
    top1_agreement: float  # share of the real images with the same top-1 class (of the noise, without real images)
    top1: float | None  # accuracy of the graph on the labelled images; None without labels
    reference_top1: float | None  # accuracy of the model on the same images
    images: int
    real_images: int
    batch_sizes: tuple[int, ...]
    ran: str = "onnxruntime on the CPU"
    compared_with: str = PYTORCH  # or reference.ONNX_FILE

    @property
    def top1_drop(self) -> float | None:
        """Loss of the model's accuracy, a fraction; None without labels."""
        return None if self.top1 is None or self.reference_top1 is None else self.reference_top1 - self.top1

    def to_json(self) -> dict[str, Any]:
        """Return JSON values for an artifact's facts."""
        return {**asdict(self), "batch_sizes": list(self.batch_sizes), "top1_drop": self.top1_drop}


def compute_answers_of_file(onnx_path: Path, precision: str, images: Tensor, *, batch: int) -> Tensor:
    """Run an ONNX file in ONNX Runtime on the CPU, with rounding as on the target, and return (n, classes).

    Raises:
        MissingExtra: onnxruntime is not installed.
    """
    *_, (session, _) = _open_sessions(onnx_path, precision)
    return run_in_batches(session, images, usual=batch)


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
    """Compare a float32 ONNX file in ONNX Runtime (CPU) with `model` in eval mode; a file that fails is renamed.

    The other arguments are those of `compute_reference`.

    Raises:
        ParityError: the largest relative error is above `tolerance`, or the graph does not run.
        MissingExtra: onnxruntime is not installed.
    """
    reference = compute_reference(model, images, labels, batch_sizes=batch_sizes, seed=seed)
    return require_parity(onnx_path, reference, "fp32", replace(LIMITS["fp32"], rel_error=tolerance))


def require_parity(
    onnx_path: Path, reference: Reference, precision: str, limits: Limits, *, final: Path | None = None
) -> Parity:
    """Compare an ONNX file with the reference; a file that fails is renamed to `<name>.rejected`.

    Args:
        onnx_path: the file.
        reference: the model's outputs.
        precision: of the file.
        limits: the largest allowed differences.
        final: the path that the file will get if it passes; None: its own path.

    Raises:
        ParityError: the file does not run, or differs by more than `limits` allow.
        MissingExtra: onnxruntime is not installed.
    """
    try:
        for session, ran in _open_sessions(onnx_path, precision):
            parity = measure_parity(session, reference, ran=ran)
            problem = gate_problem(parity, limits)
            del session  # some systems cannot rename an open file
            if problem is not None:
                break
    except ParityError as error:
        problem = str(error)
    if problem is not None:
        raise set_aside(onnx_path, problem, final)
    return parity


def _open_sessions(onnx_path: Path, precision: str) -> Iterator[tuple[Any, str]]:
    """Yield the sessions to compare a file in, each with its description for `Parity.ran`."""
    if precision == "fp8":
        yield open_unoptimised(onnx_path), f"{Parity.ran}, its optimiser off"
    elif precision != "bf16":  # bf16 has no kernels on a CPU
        yield open_session(onnx_path, threads=torch.get_num_threads()), Parity.ran
    if precision in CAST_PRECISIONS:
        ran = "onnxruntime on the CPU, in float32 with every value rounded where it is stored"
        yield open_rounding_emulation(onnx.load(onnx_path)), ran


def measure_parity(session: Any, reference: Reference, *, ran: str = Parity.ran) -> Parity:
    """Run every reference batch through an ONNX Runtime session, and compare the outputs.

    Raises:
        ParityError: a batch does not run, or its outputs have another shape.
    """
    name = session.get_inputs()[0].name
    max_abs, max_rel, max_rel_real = 0.0, 0.0, 0.0
    agreeing, agreeing_noise, correct = 0, 0, 0
    for batch in reference.batches:
        try:
            (output,) = session.run(None, {name: batch.images.numpy()})
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise ParityError(f"does not run at batch {len(batch.images)}: {first_line(error)}") from error
        actual = torch.from_numpy(output)
        if actual.shape != batch.expected.shape:
            shapes = f"{tuple(actual.shape)} where the model returns {tuple(batch.expected.shape)}"
            raise ParityError(f"returns shape {shapes}")
        absolute, relative = errors_between(actual, batch.expected)
        max_abs, max_rel = max(max_abs, absolute), max(max_rel, relative)
        same = actual.argmax(1) == batch.expected.argmax(1)
        if batch.is_real:
            max_rel_real = max(max_rel_real, relative)
            agreeing += int(same[: batch.counted].sum())
            correct += batch.count_correct(actual)
        else:
            agreeing_noise += int(same.sum())
    total = sum(len(batch.images) for batch in reference.batches)
    real = sum(batch.counted for batch in reference.batches if batch.is_real)
    return Parity(
        max_abs_error=max_abs,
        max_rel_error=max_rel,
        max_rel_error_real=max_rel_real if real else None,
        top1_agreement=agreeing / real if real else agreeing_noise / total,
        top1=correct / real if reference.top1 is not None and real else None,
        reference_top1=reference.top1 if real else None,
        images=total,
        real_images=real,
        batch_sizes=reference.batch_sizes,
        ran=ran,
        compared_with=reference.answered_by,
    )


def gated_error(parity: Parity, limits: Limits) -> float:
    """Return the relative error that `limits` apply to: over all batches, or over those of real images only."""
    if limits.counts_noise or parity.max_rel_error_real is None or not parity.max_rel_error < inf:
        return parity.max_rel_error
    return parity.max_rel_error_real


def summary_line(parity: Parity, limits: Limits) -> str:
    """Summarise a comparison in one line: error, agreement, and the accuracies where there are labels."""
    line = f"error {gated_error(parity, limits):.1e}, top-1 agreement {percent(parity.top1_agreement)}"
    if parity.top1 is None:
        return line
    model = "PyTorch" if parity.compared_with == PYTORCH else "ONNX"
    return f"{line}, top-1 {percent(parity.top1, 2)} ({model} {percent(parity.reference_top1, 2)})"


def gate_problem(parity: Parity, limits: Limits) -> str | None:
    """Describe the first limit that is exceeded, or return None; agreement and accuracy may miss theirs by one image.

    Agreement and accuracy count on real images only, since the top-1 class of noise is close to random.
    """
    error = gated_error(parity, limits)
    if not error <= limits.rel_error:
        return f"differs from {parity.compared_with} by {error:.1e} (limit {limits.rel_error:.0e})"
    if not parity.real_images:
        return None
    one = 1 / parity.real_images + 1e-9
    if parity.top1_agreement + one < limits.top1_agreement:
        share, least = percent(parity.top1_agreement, 2), percent(limits.top1_agreement)
        images = f"{share} of {parity.real_images} images (at least {least})"
        return f"gives {parity.compared_with}'s answer on only {images}"
    if parity.top1_drop is not None and parity.top1_drop > max(limits.top1_drop, one) + 1e-9:
        accuracy = f"{percent(parity.reference_top1, 2)} to {percent(parity.top1, 2)}"
        return f"loses {100 * parity.top1_drop:.2f} points of top-1, {accuracy} (at most {100 * limits.top1_drop:g})"
    return None


def open_rounding_emulation(model: ModelProto) -> Any:
    """Open a session that computes what a cast graph does, rounding included; see `casting.emulate_rounding`."""
    return open_unoptimised(emulate_rounding(model))  # optimisations could remove the casts that round


def open_unoptimised(source: Path | ModelProto) -> Any:
    """Open a session without graph optimisations, with which ONNX Runtime (1.32) computes wrong results in fp8."""
    return open_session(source, threads=torch.get_num_threads(), is_optimised=False)


def errors_between(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest absolute error, and the same divided by the largest |expected|.

    Both are infinite if a value on either side is not finite.

    >>> errors_between(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 5.0]))
    (0.5, 0.1)
    """
    if not (bool(actual.isfinite().all()) and bool(expected.isfinite().all())):
        return inf, inf
    absolute = float((actual - expected).abs().max())
    return absolute, absolute / max(_SMALLEST_RANGE, float(expected.abs().max()))
