"""Precisions of exported files, their accuracy limits against the PyTorch model, and their ONNX opsets.

The precision is part of the ONNX graph: TensorRT 11 has no flags for it. fp16 and bf16 are cast (casting.py),
int8 and fp8 are quantised (quantise.py); inputs and outputs are float32 in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from passdeploy.errors import UsageError
from passdeploy.runtime.names import PRECISIONS

CAST_PRECISIONS, QUANTISED_PRECISIONS = ("fp16", "bf16"), ("int8", "fp8")

LARGEST_FINITE: Mapping[str, float] = {"fp16": 65504.0, "bf16": 3.3895e38}  # nodes with larger numbers stay float32

SMALLEST: Mapping[str, float] = {"fp16": 2.0**-24, "bf16": 2.0**-133}  # the smallest numbers that are not zero

EXPORTED_OPSETS = (18, 23)  # the oldest and newest that torch's exporter writes without converting
# The first ONNX operator set in which convolutions have the type.
OLDEST_OPSETS: Mapping[str, int] = {"fp32": 18, "fp16": 18, "bf16": 22, "int8": 18, "fp8": 19}
# From opset 21 on, ONNX Runtime's optimiser (1.32) can break a valid int8 graph: where it moves a quantisation past a
# slice (QDQPropagationTransformer) it drops the zero point, and then refuses to open its own result.
NEWEST_OPSETS: Mapping[str, int] = {"int8": 20}
DEFAULT_OPSETS: Mapping[str, int] = dict.fromkeys(PRECISIONS, 20) | {"bf16": 22}  # TensorRT 10.3 reads both


@dataclass(frozen=True)
class Limits:
    """The largest differences allowed between an artifact and its model, as measured in `parity.Parity`."""

    rel_error: float  # at most
    top1_agreement: float  # share of the real images with the same top-1 class, at least
    top1_drop: float  # loss of accuracy on labelled images, at most; a fraction
    counts_noise: bool = True  # False: noise lies outside the calibrated range, where quantisation clips on purpose


LIMITS: Mapping[str, Limits] = {
    "fp32": Limits(rel_error=1e-4, top1_agreement=0.999, top1_drop=0.001),
    "fp16": Limits(rel_error=0.02, top1_agreement=0.995, top1_drop=0.005),
    "bf16": Limits(rel_error=0.15, top1_agreement=0.98, top1_drop=0.005),
    "int8": Limits(rel_error=0.5, top1_agreement=0.98, top1_drop=0.01, counts_noise=False),
    "fp8": Limits(rel_error=0.5, top1_agreement=0.98, top1_drop=0.01, counts_noise=False),
}


def nonzero(number: float, precision: str) -> float:
    """Return a number that `precision` would round to zero as the smallest one that is not zero, any other as it is.

    Code adds or clamps to such a number so that it never divides by zero: `F.normalize` divides by at least 1e-12.

    >>> nonzero(1e-12, "fp16") == 2.0**-24, nonzero(-1e-12, "fp16") == -(2.0**-24), nonzero(0.0, "fp16")
    (True, True, 0.0)
    """
    smallest = SMALLEST[precision]
    return math.copysign(smallest, number) if 0 < abs(number) < smallest else number


def parse_precisions(names: Sequence[str]) -> tuple[str, ...]:
    """Check the names of precisions, and return each once, in the order given.

    Raises:
        UsageError: a name is unknown, or none is given.

    >>> parse_precisions(["fp16", "fp32", "fp16"])
    ('fp16', 'fp32')
    """
    unknown = [name for name in names if name not in PRECISIONS]
    if unknown or not names:
        problem = f"unknown precision {unknown[0]!r}" if unknown else "no precision was given"
        raise UsageError(f"{problem}: choose from {', '.join(PRECISIONS)}.\nFor example: --precision fp32,fp16")
    return tuple(dict.fromkeys(names))


def choose_opset(precision: str, asked: int | None) -> int:
    """Return the ONNX operator set for a precision: `asked`, or the default one where that is None.

    Raises:
        UsageError: it cannot be written, does not have the precision, or ONNX Runtime does not open the result.

    >>> choose_opset("fp16", None), choose_opset("bf16", None)
    (20, 22)
    """
    opset = DEFAULT_OPSETS[precision] if asked is None else asked
    if not EXPORTED_OPSETS[0] <= opset <= EXPORTED_OPSETS[1]:
        oldest, newest = EXPORTED_OPSETS
        raise UsageError(f"opset {opset} cannot be written: choose {oldest} to {newest}; 20 suits TensorRT.")
    if opset < OLDEST_OPSETS[precision]:
        raise UsageError(
            f"ONNX opset {opset} has no {precision} convolutions; they came with opset {OLDEST_OPSETS[precision]}.\n"
            f"Ask for --opset {OLDEST_OPSETS[precision]}, or leave --opset out."
        )
    if opset > NEWEST_OPSETS.get(precision, opset):
        raise UsageError(
            f"ONNX Runtime does not open every {precision} graph in opset {opset}: {NEWEST_OPSETS[precision]} is the "
            "newest that works.\n"
            f"Ask for --opset {NEWEST_OPSETS[precision]}, or leave --opset out."
        )
    return opset
