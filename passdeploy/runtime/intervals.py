"""Tests of confidence intervals, and the interval of a difference of accuracies; nothing here needs torch."""

from __future__ import annotations

from math import log, sqrt

_STRETCH_TO_99_PERCENT = 1.6  # width of a 99 % interval over that of a 95 % one (t with 5 degrees of freedom: 1.57)
_NORMAL_QUANTILE = 1.96  # 97.5 % quantile of the standard normal distribution


def is_measurable(low: float, high: float) -> bool:
    """Test whether a speed-up, or slowdown, with this 95 % interval is real: the 99 % interval must leave 1 out.

    At 95 %, one comparison in twenty of a file with itself would find a difference.

    >>> is_measurable(1.002, 1.03), is_measurable(1.02, 1.05), is_measurable(0.8, 0.9)
    (False, True, True)
    """
    middle, half = log(low * high) / 2, log(high / low) / 2
    return abs(middle) > _STRETCH_TO_99_PERCENT * half


def accuracy_interval(accuracy: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy that was counted on so many images (Wilson 1927).

    >>> [round(bound, 4) for bound in accuracy_interval(0.9889, 359)]
    [0.9718, 0.9957]
    """
    z2 = _NORMAL_QUANTILE**2
    middle = (accuracy + z2 / (2 * images)) / (1 + z2 / images)
    half = _NORMAL_QUANTILE * sqrt(accuracy * (1 - accuracy) / images + z2 / (4 * images**2)) / (1 + z2 / images)
    return max(0.0, round(middle - half, 12)), min(1.0, round(middle + half, 12))


def accuracy_change_interval(before: float, after: float, images: int) -> tuple[float, float]:
    """Return a 95 % interval of `after - before`, two accuracies on the same images (Newcombe 1998, method 10).

    It takes the answers of the two networks for independent, so it is wider than need be. `paired_change_interval` is
    better where it is known on which images the answers differ.
    """
    low_before, high_before = accuracy_interval(before, images)
    low_after, high_after = accuracy_interval(after, images)
    change = after - before
    down = sqrt((after - low_after) ** 2 + (high_before - before) ** 2)
    up = sqrt((high_after - after) ** 2 + (before - low_before) ** 2)
    return change - down, change + up


def paired_change_interval(became_right: int, became_wrong: int, images: int) -> tuple[float, float]:
    """Return the 95 % interval of the change of an accuracy between two networks on the same images.

    What counts is on how many images one is right and the other wrong (adjusted Wald: Bonett and Price 2012).

    >>> [round(bound, 4) for bound in paired_change_interval(4, 4, 359)]
    [-0.0172, 0.0172]
    """
    gained, lost = (became_right + 1) / (images + 2), (became_wrong + 1) / (images + 2)
    half = _NORMAL_QUANTILE * sqrt((gained + lost - (gained - lost) ** 2) / (images + 2))
    return max(-1.0, gained - lost - half), min(1.0, gained - lost + half)
