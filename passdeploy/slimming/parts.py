"""Errors of the parts of an output, where some are very small beside others.

A detector may return boxes in pixels and class scores near zero in one tensor. Divided by the largest box, an error
of the scores looks like rounding, even if they are all wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

PART_TOLERANCE = 1e-5  # relative error of a part in float64
_FAINT = 1e-3  # a part is faint if its largest magnitude is below this share of the whole output's
_FLOOR = 1e-7  # of the whole output's magnitude: what is smaller may be rounding of what it was computed from


def has_faint_parts(output: Tensor) -> bool:
    """True if along a dimension of an output, batch and positions apart, some indices are very small beside others."""
    return any(bool((part < _FAINT * part.max()).any()) for part in _magnitudes(output))


def error_by_part(expected: Tensor, found: Tensor) -> float:
    """Divide the difference in each part of an output by the magnitude of that part; infinite where shapes differ."""
    if expected.shape != found.shape:
        return float("inf")
    worst = 0.0
    for size, difference in zip(_magnitudes(expected), _magnitudes(found - expected), strict=True):
        worst = max(worst, float((difference / size.clamp_min(float(size.max()) * _FLOOR).clamp_min(1e-30)).max()))
    return worst


def _magnitudes(output: Tensor) -> list[Tensor]:
    """Return the largest magnitude at each index of the second dimension, and of the last one if that is another.

    Empty for outputs of another type than real floats, and for those of one dimension.
    """
    if not output.is_floating_point() or output.ndim < 2 or not output.numel():
        return []
    sizes = output.detach().abs().nan_to_num(nan=torch.inf)
    return [sizes.movedim(dim, 0).flatten(1).amax(1) for dim in dict.fromkeys((1, output.ndim - 1))]
