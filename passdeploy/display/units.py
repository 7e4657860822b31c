"""Formatting of numbers with their units: quantities, milliseconds, durations, relative changes."""

from __future__ import annotations

UNKNOWN = "–"


def quantity(value: float | None) -> str:
    """Format a number with three digits and a unit: k, M or G.

    >>> quantity(2_236_682), quantity(90_210), quantity(7)
    ('2.24 M', '90.2 k', '7')
    """
    if value is None:
        return UNKNOWN
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:#.3g}".rstrip(".") + f" {unit}"
    return f"{value:g}"


def relative_change(before: float | None, after: float | None) -> str:
    """Format the change from `before` to `after` in percent, with its sign."""
    if not before or after is None:
        return UNKNOWN
    return f"{100 * (after / before - 1):+.1f} %"


def milliseconds(value: float | None) -> str:
    """Format a time in milliseconds with three digits."""
    return UNKNOWN if value is None else f"{value:.3g} ms"


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
