"""Statistics of latencies: percentiles, speed-ups and their 95 % confidence intervals, as pure functions of call times.

Percentiles follow trtexec's definition, so that results can be compared with it. Call times come in blocks, and blocks
in sessions: both networks are loaded anew for every session, because the addresses of their memory make one a percent
or two faster for as long as it is loaded, which more calls do not average out. Intervals are Student's t over sessions
(of the logarithms of their medians, or of the ratios of their medians), with the extreme sessions trimmed. Where there
is one session only, whole blocks are resampled (for a speed-up, pairs of neighbouring blocks, so that disturbances of
both networks cancel out), and the usual spread between sessions is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, hypot, log, sqrt

import numpy as np
from numpy.typing import NDArray

from passdeploy.runtime.intervals import is_measurable as is_measurable

CallTimes = NDArray[np.float64]  # milliseconds of one session, shape (blocks, calls in a block)

SAMPLES_FOR_P99 = 1000  # with fewer, p99 would rest on fewer than ten calls
RESAMPLES = 1000  # of the bootstrap
_TAIL_PERCENT = 2.5  # on either side of a 95 % interval
# Standard deviation of the logarithm of the ratio of two sessions of one file, measured by `benchmarks.latency same`.
BETWEEN_SESSIONS = 0.012
_NORMAL_QUANTILE = 1.96  # 97.5 % quantile of the standard normal distribution
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
_STUDENT_QUANTILES = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class LatencySummary:
    """The latency of one network over all sessions."""

    n: int  # calls
    median_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float | None  # None: too few calls
    cv: float  # coefficient of variation: standard deviation / mean
    ci95_rel: float  # half the width of the 95 % interval of the median, relative to the median


@dataclass(frozen=True)
class Speedup:
    """The ratio of two latencies, slow / fast, with its 95 % interval."""

    ratio: float
    low: float
    high: float

    @property
    def is_measurable(self) -> bool:
        """False if there is no measurable difference."""
        return is_measurable(self.low, self.high)


def percentile(samples: Sequence[float] | CallTimes, percent: float) -> float:
    """Return trtexec's percentile: the sample that `percent` of all samples do not exceed.

    >>> percentile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0], 90)
    9.0
    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64), axis=None)
    if not 0 <= percent <= 100 or ordered.size == 0:
        raise ValueError(f"percentile {percent} of {ordered.size} samples does not exist")
    excluded = int((1 - percent / 100) * ordered.size + 1e-9)  # 1e-9, since 1 - 0.9 < 0.1 in floating point
    return float(ordered[max(ordered.size - 1 - excluded, 0)])


def summarise_times(*sessions: CallTimes, seed: int = 0) -> LatencySummary:
    """Summarise the call times of one network.

    Args:
        sessions: milliseconds of each session, shape (blocks, calls in a block).
        seed: of the bootstrap; the same call times give the same interval.
    """
    samples = np.concatenate([times.ravel() for times in sessions])
    median = float(np.median(samples))
    if len(sessions) > 1:
        _, half = _trimmed_t_interval([log(float(np.median(times))) for times in sessions])
        low, high = median * exp(-half), median * exp(half)
    else:
        low, high = _percentile_interval([float(np.median(drawn)) for (drawn,) in _bootstrap(sessions, seed)])
    return LatencySummary(
        n=samples.size,
        median_ms=median,
        p90_ms=percentile(samples, 90),
        p95_ms=percentile(samples, 95),
        p99_ms=percentile(samples, 99) if samples.size >= SAMPLES_FOR_P99 else None,
        cv=float(np.std(samples) / np.mean(samples)),
        ci95_rel=(high - low) / 2 / median,
    )


def speedup(slow: CallTimes, fast: CallTimes, *, seed: int = 0) -> Speedup:
    """Compute the ratio of the medians of one session, slow / fast, and its interval.

    Block i of `slow` was measured next to block i of `fast`; both have the same number of blocks.
    """
    if len(slow) != len(fast):
        raise ValueError(f"{len(slow)} blocks against {len(fast)}: interleaved blocks come in pairs")
    ratio = float(np.median(slow) / np.median(fast))
    ratios = [float(np.median(a) / np.median(b)) for a, b in _bootstrap((slow, fast), seed)]
    low, high = _percentile_interval(ratios)
    down, up = (
        hypot(max(off, 0.0), _NORMAL_QUANTILE * BETWEEN_SESSIONS) for off in (log(ratio / low), log(high / ratio))
    )
    return Speedup(ratio, ratio * exp(-down), ratio * exp(up))


def speedup_over_sessions(slow: Sequence[CallTimes], fast: Sequence[CallTimes]) -> Speedup:
    """Compute the speed-up over several sessions: the trimmed geometric mean of their ratios, and its interval.

    Session i of `slow` was measured in turns with session i of `fast`.
    """
    if len(slow) == 1:
        return speedup(slow[0], fast[0])
    middle, half = _trimmed_t_interval(
        [log(float(np.median(a) / np.median(b))) for a, b in zip(slow, fast, strict=True)]
    )
    return Speedup(exp(middle), exp(middle - half), exp(middle + half))


def _trimmed_t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the trimmed mean and half the width of its 95 % interval: Student's t (Tukey and McLaughlin 1963).

    An eighth of the values is left out at either end, such as a session in which another program used the same core.
    """
    ordered = np.sort(np.asarray(values, float))
    cut = len(ordered) // 8
    kept = ordered[cut : len(ordered) - cut]
    spread = float(np.std(np.clip(ordered, kept[0], kept[-1]), ddof=1))
    error = spread / (len(kept) / len(ordered) * sqrt(len(ordered)))
    return float(kept.mean()), _STUDENT_QUANTILES[min(len(kept) - 1, len(_STUDENT_QUANTILES)) - 1] * error


def _bootstrap(series: tuple[CallTimes, ...], seed: int) -> list[tuple[CallTimes, ...]]:
    """Draw blocks with replacement, RESAMPLES times, the same blocks of every series."""
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, len(series[0]), size=(RESAMPLES, len(series[0])))
    return [tuple(samples[draw] for samples in series) for draw in draws]


def _percentile_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the bounds that 95 % of bootstrapped values lie between."""
    low, high = np.percentile(values, [_TAIL_PERCENT, 100 - _TAIL_PERCENT])
    return float(low), float(high)
