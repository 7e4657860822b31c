"""Charts as inline SVG: curves over steps, bars of widths, ranges of scores, points of several runs.

Colours are classes of style.css, so that a chart follows the colour scheme of the page. A chart is as wide as the page
on a telephone, so that its text is never scaled down; on a wider page several stand side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

from markupsafe import Markup

WIDTH, HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 34
_MOST_POINTS = 90  # of a curve; more are averaged


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, its points, and its colour (a class of style.css)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "a"


@dataclass(frozen=True)
class Point:
    """A point of a scatter chart."""

    name: str
    x: float
    y: float
    y_low: float | None = None  # interval
    y_high: float | None = None
    is_best: bool = False  # on the Pareto front
    x_low: float | None = None
    x_high: float | None = None
    label: str = ""  # written beside it


def line_chart(
    title: str, lines: Sequence[Line], *, x_label: str, y_label: str, mark: float | None = None, is_share: bool = False
) -> Markup:
    """Draw lines over a shared axis.

    Args:
        title: what a screen reader says.
        lines: at least one, with points.
        x_label: under the axis.
        y_label: above the axis.
        mark: a dashed horizontal line at this height, such as a target.
        is_share: heights are fractions, written in percent.
    """
    thin = [Line(line.name, *_thinned(line.x, line.y), line.colour) for line in lines]
    heights = [y for line in thin for y in line.y] + ([mark] if mark is not None else [])
    x_axis = _Axis.of([x for line in thin for x in line.x], _LEFT, WIDTH - _RIGHT)
    y_axis = _Axis.of([*heights, 0.0], HEIGHT - _BOTTOM, _TOP)
    parts = _frame(x_axis, y_axis, x_label, y_label, is_share)
    if mark is not None:
        parts.append(_rule(y_axis.at(mark), "mark"))
    for line in thin:
        points = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
        parts.append(f'<polyline class="line {line.colour}" points="{points}"/>')
    return _svg(title, parts)


def scatter_chart(title: str, points: Sequence[Point], *, x_label: str, y_label: str) -> Markup:
    """Draw points with their intervals; those on the front are filled and joined. Numbers are those of a table.

    Heights are fractions, written in percent. The best is at the upper left.
    """
    spread_y = [y for p in points for y in (p.y, p.y_low, p.y_high) if y is not None]
    spread_x = [x for p in points for x in (p.x, p.x_low, p.x_high) if x is not None]
    x_axis = _Axis.of([*spread_x, 0.0], _LEFT, WIDTH - _RIGHT)
    y_axis = _Axis.of(spread_y, HEIGHT - _BOTTOM, _TOP, is_tight=True)
    parts = _frame(x_axis, y_axis, x_label, y_label, True)
    front = sorted((point for point in points if point.is_best), key=lambda point: point.x)
    joined = " ".join(f"{x_axis.at(point.x):.1f},{y_axis.at(point.y):.1f}" for point in front)
    parts.append(f'<polyline class="front" points="{joined}"/>')
    for point in points:
        x, y = x_axis.at(point.x), y_axis.at(point.y)
        if point.y_low is not None and point.y_high is not None:
            parts.append(
                f'<path class="whisker" d="M{x:.1f} {y_axis.at(point.y_low):.1f}V{y_axis.at(point.y_high):.1f}"/>'
            )
        if point.x_low is not None and point.x_high is not None:
            parts.append(
                f'<path class="whisker" d="M{x_axis.at(point.x_low):.1f} {y:.1f}H{x_axis.at(point.x_high):.1f}"/>'
            )
        kind = "dot best" if point.is_best else "dot"
        parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(point.name)}</title></circle>'
        )
        end = x > WIDTH - 40
        parts.append(
            f'<text class="number" x="{x - 8 if end else x + 8:.1f}" y="{y - 7:.1f}" '
            f'text-anchor="{"end" if end else "start"}">{escape(point.label)}</text>'
        )
    return _svg(title, parts)


def bar(share: float, name: str, *, colour: str = "a", width: int = 120) -> Markup:
    """Draw a share of a whole as a horizontal bar, for a cell of a table."""
    filled = max(0.0, min(1.0, share)) * width
    return Markup(
        f'<svg class="bar" role="img" aria-label="{escape(name)}" viewBox="0 0 {width} 10" width="{width}" height="10">'
        f'<rect class="rest" width="{width}" height="10" rx="2"/>'
        f'<rect class="{colour}" width="{filled:.1f}" height="10" rx="2"/></svg>'
    )


def two_bars(before: float, after: float, longest: float, name: str, *, width: int = 120) -> Markup:
    """Draw two lengths one above the other, before and after, for a cell of a table."""
    first, second = (width * value / longest if longest else 0.0 for value in (before, after))
    return Markup(
        f'<svg class="bar" role="img" aria-label="{escape(name)}" viewBox="0 0 {width} 12" width="{width}" height="12">'
        f'<rect class="before" width="{first:.1f}" height="5" rx="1"/>'
        f'<rect class="a" y="7" width="{second:.1f}" height="5" rx="1"/></svg>'
    )


def range_strip(values: Sequence[float], lowest: float, highest: float, name: str, *, width: int = 120) -> Markup:
    """Draw how values spread between two bounds: a line over all, a box over the middle half, a tick at the median.

    Args:
        values: least, lower quartile, median, upper quartile, largest.
        lowest: the value at the left end of the strip.
        highest: the value at its right end.
        name: what a screen reader says.
        width: of the strip in pixels.
    """
    scale = (width - 2) / (highest - lowest) if highest > lowest else 0.0
    least, lower, median, upper, largest = (1 + (value - lowest) * scale for value in values)
    return Markup(
        f'<svg class="bar" role="img" aria-label="{escape(name)}" viewBox="0 0 {width} 12" width="{width}" height="12">'
        f'<path class="span" d="M{least:.1f} 6H{largest:.1f}"/>'
        f'<rect class="box" x="{lower:.1f}" y="2" width="{max(1.0, upper - lower):.1f}" height="8" rx="1"/>'
        f'<path class="tick" d="M{median:.1f} 1V11"/></svg>'
    )


@dataclass(frozen=True)
class _Axis:
    """A scale from values to pixels, with round numbers at its ticks."""

    low: float
    high: float
    start: float  # pixels
    end: float
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float, *, is_tight: bool = False) -> _Axis:
        low, high = min(values), max(values)
        if high - low < 1e-12:
            low, high = low - (0.5 * abs(low) or 0.5), high + (0.5 * abs(high) or 0.5)
        if is_tight:
            low, high = low - 0.08 * (high - low), high + 0.12 * (high - low)
        step = _round_step((high - low) / 4)
        first, last = floor(low / step + 1e-9), -floor(-high / step + 1e-9)
        if not is_tight:
            low, high = first * step, last * step
        ticks = (number * step for number in range(first, last + 1))
        return cls(low, high, start, end, tuple(tick for tick in ticks if low - 1e-9 <= tick <= high + 1e-9))

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _round_step(rough: float) -> float:
    """Return the nearest step above of 1, 2, 2.5 or 5 times a power of ten."""
    power: float = 10.0 ** floor(log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough - 1e-12 * power)


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str, is_share: bool) -> list[str]:
    """Draw the axes, their ticks and labels."""
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        parts.append(_rule(y, "grid"))
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick_text(tick, y_axis, is_share)}</text>'
        )
    for tick in x_axis.ticks:
        x = x_axis.at(tick)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="middle">{_tick_text(tick, x_axis)}</text>'
        )
    parts.append(
        f'<text class="label" x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>'
    )
    parts.append(f'<text class="label" x="{_LEFT}" y="{_TOP - 1}">{escape(y_label)}</text>')
    return parts


def _tick_text(value: float, axis: _Axis, is_share: bool = False) -> str:
    """Write a tick with as many digits as tell it from its neighbours."""
    factor = 100 if is_share else 1
    step = factor * ((axis.ticks[1] - axis.ticks[0]) if len(axis.ticks) > 1 else axis.high - axis.low)
    digits = max(0, -floor(log10(step) + 1e-9))
    digits += 1 if round(step, digits) != round(step, digits + 1) else 0
    return f"{factor * value:,.{digits}f}{' %' if is_share else ''}"


def _rule(y: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>'


def _svg(title: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg class="chart" role="img" aria-label="{escape(title)}" viewBox="0 -6 {WIDTH} {HEIGHT + 6}">'
        + "".join(parts)
        + "</svg>"
    )


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Average neighbouring points until few enough are left."""
    size = -(-len(x) // _MOST_POINTS)
    chunks = [slice(first, first + size) for first in range(0, len(x), size)]
    return tuple([sum(values[chunk]) / len(values[chunk]) for chunk in chunks] for values in (x, y))  # type: ignore[return-value]
