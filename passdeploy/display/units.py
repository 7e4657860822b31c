"""Formatting of numbers with their units, as people write them: quantities, milliseconds, shares, durations."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from passdeploy.errors import UNKNOWN


def three_digits(value: float) -> str:
    """Format a positive number with three significant digits, never with an exponent.

    >>> three_digits(1190.4), three_digits(12.345), three_digits(0.25), three_digits(0.0004321), three_digits(0)
    ('1,190', '12.3', '0.250', '0.000432', '0')
    """
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    digits, size = 2, abs(value)
    while 0 < size < 9.995 / 10 ** (digits - 2) and digits < 9:
        digits += 1
    return f"{value:.{max(0, digits - 1)}f}" if value else "0"


def quantity(value: float | None) -> str:
    """Format a number with three digits and a unit: k, M or G.

    >>> quantity(2_236_682), quantity(90_210), quantity(7), quantity(4_089_184_256), quantity(999_999)
    ('2.24 M', '90.2 k', '7', '4.09 G', '1.00 M')
    """
    if value is None:
        return UNKNOWN
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{three_digits(value / factor)} {unit}"
    return f"{value:g}"


def megabytes(size_bytes: float) -> str:
    """Format a size in megabytes.

    >>> megabytes(4_123_456), megabytes(51_200)
    ('4.1 MB', '0.05 MB')
    """
    size = size_bytes / 1e6
    return f"{size:,.1f} MB" if size >= 0.1 else f"{size:.2f} MB"


def relative_change(before: float | None, after: float | None) -> str:
    """Format the change from `before` to `after` in percent, with its sign."""
    if not before or after is None:
        return UNKNOWN
    return f"{100 * (after / before - 1):+.1f} %"


def milliseconds(value: float | None) -> str:
    """Format a time in milliseconds with three digits.

    >>> milliseconds(1190.4), milliseconds(7.0)
    ('1,190 ms', '7.00 ms')
    """
    return UNKNOWN if value is None else f"{three_digits(value)} ms"


def latency(row: Mapping[str, Any]) -> str:
    """Format the median latency of a row of `profile.json` with half the width of its 95 % interval, rounded up.

    >>> latency({"median_ms": 1.914, "ci95_rel": 0.0123})
    '1.91 ms ±2%'
    """
    half = row.get("ci95_rel")
    return milliseconds(row.get("median_ms")) + ("" if half is None else f" ±{max(1, ceil(100 * half - 1e-6))}%")


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes and hours.

    >>> duration(0.42), duration(75), duration(7260)
    ('0.4 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
