"""From samples to statements: pure functions, no clock, no machine.

Percentiles follow trtexec's definition, so that our numbers can be laid beside its own. Samples come in
blocks, and consecutive samples resemble each other; intervals therefore resample whole blocks, never
single samples, and a speed-up resamples pairs of neighbouring blocks of the two networks, so that
what slows both for a while cancels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]  # milliseconds, shape (blocks, samples in a block)

SAMPLES_FOR_P99 = 1000  # below this, p99 rests on fewer than ten samples
RESAMPLES = 1000
_TAIL = 2.5  # percent on either side of a 95 % interval


# Two sessions of one file differ by up to about this, for as long as they live: their memory lies in different places.
# No interval over the blocks of one measurement can show it.
RESOLUTION = 0.01


def is_measurable(low: float, high: float) -> bool:
    """Whether a speed-up with this interval is one, or a slowdown, and not what any two sessions differ by.

    >>> is_measurable(1.002, 1.03), is_measurable(1.02, 1.05), is_measurable(0.8, 0.9)
    (False, True, True)
    """
    return low > 1 + RESOLUTION or high < 1 - RESOLUTION


@dataclass(frozen=True)
class Summary:
    """What one network took."""

    n: int
    median_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float | None  # None: too few samples to say
    cv: float  # coefficient of variation: standard deviation / mean
    ci95_rel: float  # half the width of the 95 % interval of the median, relative to the median


@dataclass(frozen=True)
class Speedup:
    """How many times faster B is than A, with its 95 % interval."""

    ratio: float
    low: float
    high: float

    @property
    def is_measurable(self) -> bool:
        """False where the interval comes within `RESOLUTION` of 1: no measurable difference."""
        return is_measurable(self.low, self.high)


def percentile(samples: Sequence[float] | Samples, percent: float) -> float:
    """trtexec's percentile: the sample that `percent` of all samples do not exceed.

    >>> percentile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0], 90)
    9.0
    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64), axis=None)
    if not 0 <= percent <= 100 or ordered.size == 0:
        raise ValueError(f"percentile {percent} of {ordered.size} samples does not exist")
    excluded = int((1 - percent / 100) * ordered.size + 1e-9)  # the 1e-9 undoes 1 - 0.9 < 0.1
    return float(ordered[max(ordered.size - 1 - excluded, 0)])


def summarise(samples: Samples, *, seed: int = 0) -> Summary:
    """The numbers of one network.

    Args:
        samples: milliseconds, shape (blocks, samples in a block).
        seed: of the bootstrap; the same samples give the same interval.
    """
    median = float(np.median(samples))
    low, high = _interval([float(np.median(drawn)) for (drawn,) in _resampled((samples,), seed)])
    return Summary(
        n=samples.size,
        median_ms=median,
        p90_ms=percentile(samples, 90),
        p95_ms=percentile(samples, 95),
        p99_ms=percentile(samples, 99) if samples.size >= SAMPLES_FOR_P99 else None,
        cv=float(np.std(samples) / np.mean(samples)),
        ci95_rel=(high - low) / 2 / median,
    )


def speedup(slow: Samples, fast: Samples, *, seed: int = 0) -> Speedup:
    """The ratio of the medians, slow / fast, and its interval.

    Block i of `slow` was measured next to block i of `fast`; both have the same number of blocks.
    """
    if len(slow) != len(fast):
        raise ValueError(f"{len(slow)} blocks against {len(fast)}: interleaved blocks come in pairs")
    ratios = [float(np.median(a) / np.median(b)) for a, b in _resampled((slow, fast), seed)]
    low, high = _interval(ratios)
    return Speedup(float(np.median(slow) / np.median(fast)), low, high)


def _resampled(series: tuple[Samples, ...], seed: int) -> list[tuple[Samples, ...]]:
    """Every series with the same blocks drawn with replacement, RESAMPLES times."""
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, len(series[0]), size=(RESAMPLES, len(series[0])))
    return [tuple(samples[draw] for samples in series) for draw in draws]


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [_TAIL, 100 - _TAIL])
    return float(low), float(high)
