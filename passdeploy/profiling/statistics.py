"""From samples to statements: pure functions, no clock, no machine.

Percentiles follow trtexec's definition, so that our numbers can be laid beside its own. Samples come in blocks, and
blocks in sittings: for every sitting both networks are loaded anew, since where their memory lies makes one a percent
or two faster than the other for as long as they live, which no number of calls shows. So an interval is one of
Student's t over sittings (the logarithms of their medians, or of the ratios of these), the extreme ones left out.
Where there is one sitting only, whole blocks are resampled, pairs of neighbouring ones for a speed-up, so that what
slows both for a while cancels out; and what sittings usually differ by is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, hypot, log, sqrt

import numpy as np
from numpy.typing import NDArray

CallTimes = NDArray[np.float64]  # milliseconds, shape (blocks, samples in a block)

SAMPLES_FOR_P99 = 1000  # below this, p99 rests on fewer than ten samples
RESAMPLES = 1000
_TAIL = 2.5  # percent on either side of a 95 % interval
# Standard deviation of the logarithm of the ratio of two sessions of one file: benchmarks/latency.py, part same.
BETWEEN_SESSIONS = 0.012
_NORMAL = 1.96  # of the standard normal distribution, 97.5 %
_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of Student's t with 1, 2, ... degrees
_SURELY = 1.6  # a 95 % interval stretched by this is one of about 99 % (t with 5 degrees of freedom: 1.57)


def is_measurable(low: float, high: float) -> bool:
    """Whether a speed-up with this 95 % interval is one, or a slowdown: 1 is outside even at about 99 %.

    At 95 %, one comparison in twenty of a file with itself would find a difference.

    >>> is_measurable(1.002, 1.03), is_measurable(1.02, 1.05), is_measurable(0.8, 0.9)
    (False, True, True)
    """
    middle, half = log(low * high) / 2, log(high / low) / 2
    return abs(middle) > _SURELY * half


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
        """False: no measurable difference."""
        return is_measurable(self.low, self.high)


def percentile(samples: Sequence[float] | CallTimes, percent: float) -> float:
    """trtexec's percentile: the sample that `percent` of all samples do not exceed.

    >>> percentile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0], 90)
    9.0
    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64), axis=None)
    if not 0 <= percent <= 100 or ordered.size == 0:
        raise ValueError(f"percentile {percent} of {ordered.size} samples does not exist")
    excluded = int((1 - percent / 100) * ordered.size + 1e-9)  # the 1e-9 undoes 1 - 0.9 < 0.1
    return float(ordered[max(ordered.size - 1 - excluded, 0)])


def summarise_times(*sessions: CallTimes, seed: int = 0) -> Summary:
    """The numbers of one network.

    Args:
        sittings: milliseconds of each, shape (blocks, samples in a block).
        seed: of the bootstrap; the same samples give the same interval.
    """
    samples = np.concatenate([taken.ravel() for taken in sessions])
    median = float(np.median(samples))
    if len(sessions) > 1:
        _, half = _student([log(float(np.median(taken))) for taken in sessions])
        low, high = median * exp(-half), median * exp(half)
    else:
        low, high = _interval([float(np.median(drawn)) for (drawn,) in _resampled(sessions, seed)])
    return Summary(
        n=samples.size,
        median_ms=median,
        p90_ms=percentile(samples, 90),
        p95_ms=percentile(samples, 95),
        p99_ms=percentile(samples, 99) if samples.size >= SAMPLES_FOR_P99 else None,
        cv=float(np.std(samples) / np.mean(samples)),
        ci95_rel=(high - low) / 2 / median,
    )


def speedup(slow: CallTimes, fast: CallTimes, *, seed: int = 0) -> Speedup:
    """The ratio of the medians of one sitting, slow / fast, and its interval.

    Block i of `slow` was measured next to block i of `fast`; both have the same number of blocks.
    """
    if len(slow) != len(fast):
        raise ValueError(f"{len(slow)} blocks against {len(fast)}: interleaved blocks come in pairs")
    ratio = float(np.median(slow) / np.median(fast))
    ratios = [float(np.median(a) / np.median(b)) for a, b in _resampled((slow, fast), seed)]
    low, high = _interval(ratios)
    down, up = (hypot(max(off, 0.0), _NORMAL * BETWEEN_SESSIONS) for off in (log(ratio / low), log(high / ratio)))
    return Speedup(ratio, ratio * exp(-down), ratio * exp(up))


def speedup_over(slow: Sequence[CallTimes], fast: Sequence[CallTimes]) -> Speedup:
    """The speed-up over several sittings: the geometric mean of their middle ratios, and its interval.

    Sitting i of `slow` was measured in turns with sitting i of `fast`.
    """
    if len(slow) == 1:
        return speedup(slow[0], fast[0])
    middle, half = _student([log(float(np.median(a) / np.median(b))) for a, b in zip(slow, fast, strict=True)])
    return Speedup(exp(middle), exp(middle - half), exp(middle + half))


def _student(values: Sequence[float]) -> tuple[float, float]:
    """The mean of the middle, and half of its 95 % interval: Student's t, trimmed (Tukey and McLaughlin 1963).

    An eighth of the values is left out at either end: a sitting in which another program had our core says nothing.
    """
    ordered = np.sort(np.asarray(values, float))
    cut = len(ordered) // 8
    kept = ordered[cut : len(ordered) - cut]
    spread = float(np.std(np.clip(ordered, kept[0], kept[-1]), ddof=1))
    error = spread / (len(kept) / len(ordered) * sqrt(len(ordered)))
    return float(kept.mean()), _STUDENT[min(len(kept) - 1, len(_STUDENT)) - 1] * error


def _resampled(series: tuple[CallTimes, ...], seed: int) -> list[tuple[CallTimes, ...]]:
    """Every series with the same blocks drawn with replacement, RESAMPLES times."""
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, len(series[0]), size=(RESAMPLES, len(series[0])))
    return [tuple(samples[draw] for samples in series) for draw in draws]


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [_TAIL, 100 - _TAIL])
    return float(low), float(high)
