from __future__ import annotations

import numpy as np
import pytest

from passdeploy.profiling.statistics import CallTimes, percentile, speedup, speedup_over_sessions, summarise_times


def noisy(ms: float, *, seed: int, blocks: int = 40, calls: int = 10, drift: CallTimes | None = None) -> CallTimes:
    """Draw log-normal times around `ms` with 5 % scatter, multiplied by a drift per block."""
    samples = ms * np.random.default_rng(seed).lognormal(0, 0.05, (blocks, calls))
    return samples if drift is None else samples * drift[:, None]


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (50, 50.0), (90, 90.0), (95, 95.0), (99, 99.0), (100, 100.0)]
)
def test_percentiles_are_samples_and_follow_trtexec(percent: float, expected: float):
    assert percentile(list(np.arange(100, 0, -1.0)), percent) == expected


def test_a_percentile_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="of 0 samples"):
        percentile([], 50)


def test_the_summary_of_known_samples():
    summary = summarise_times(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 30.0]]))
    assert (summary.n, summary.median_ms, summary.p90_ms) == (6, 3.5, 30.0)
    assert summary.cv == pytest.approx(np.std([1, 2, 3, 4, 5, 30]) / 7.5)


@pytest.mark.parametrize(("blocks", "is_there"), [(99, False), (100, True)])
def test_p99_is_refused_under_a_thousand_samples(blocks: int, is_there: bool):
    assert (summarise_times(noisy(1.0, seed=0, blocks=blocks)).p99_ms is not None) == is_there


def test_the_interval_of_the_median_narrows_with_samples_and_is_reproducible():
    few, many = (summarise_times(noisy(2.0, seed=3, blocks=blocks)) for blocks in (10, 1000))
    assert many.ci95_rel < few.ci95_rel / 3
    assert summarise_times(noisy(2.0, seed=3, blocks=10)) == few


def test_constant_samples_have_no_scatter():
    found = summarise_times(np.full((8, 4), 2.5))
    assert (found.cv, found.ci95_rel) == (0.0, 0.0)


def test_a_true_speedup_is_found_inside_its_interval():
    gain = speedup(noisy(2.0, seed=1), noisy(1.0, seed=2))
    assert gain.low < 2.0 < gain.high
    assert gain.is_measurable
    assert gain.ratio == pytest.approx(2.0, rel=0.02)


def test_a_slowdown_is_measurable_too():
    assert speedup(noisy(1.0, seed=1), noisy(2.0, seed=2)).high < 1.0


def test_the_same_network_twice_is_rarely_called_different():
    verdicts = [speedup(noisy(1.0, seed=2 * i), noisy(1.0, seed=2 * i + 1)).is_measurable for i in range(60)]
    assert sum(verdicts) <= 8  # 5 % of 60 are expected


def sessions(ms: float, *, seed: int, count: int = 8) -> list[CallTimes]:
    """Draw sessions that differ from each other by 1.2 %, each for as long as it lasts."""
    lasting = np.random.default_rng(seed).lognormal(0, 0.012, count)
    return [noisy(ms * factor, seed=100 * seed + number, blocks=5) for number, factor in enumerate(lasting)]


def test_over_sessions_the_interval_holds_what_they_differ_by():
    same = [speedup_over_sessions(sessions(1.0, seed=2 * i), sessions(1.0, seed=2 * i + 1)) for i in range(100)]
    assert 88 <= sum(gain.low <= 1 <= gain.high for gain in same) <= 100  # 95 are expected
    assert sum(gain.is_measurable for gain in same) <= 5  # 1 is expected
    other = [speedup_over_sessions(sessions(1.05, seed=2 * i), sessions(1.0, seed=2 * i + 1)) for i in range(40)]
    assert sum(gain.is_measurable for gain in other) >= 34


def test_one_disturbed_session_hides_no_difference():
    slow, fast = sessions(1.06, seed=4), sessions(1.0, seed=5)
    clear = speedup_over_sessions(slow, fast)
    slow[3] = slow[3] * 1.5
    assert clear.is_measurable
    assert speedup_over_sessions(slow, fast).is_measurable


def test_the_median_over_sessions_has_the_interval_of_sessions():
    one, many = sessions(2.0, seed=5)[0], sessions(2.0, seed=5)
    found = summarise_times(*many)
    assert found.n == sum(times.size for times in many)
    assert found.median_ms == pytest.approx(2.0, rel=0.02)
    medians = np.sort([np.log(np.median(times)) for times in many])
    clipped = np.clip(medians, medians[1], medians[-2])  # 6 of 8 are kept: t with 5 degrees of freedom
    assert found.ci95_rel == pytest.approx(2.571 * np.std(clipped, ddof=1) / (0.75 * 8**0.5), rel=1e-3)
    assert summarise_times(one).n == one.size


def test_one_session_is_not_trusted_beyond_what_sessions_usually_differ_by():
    gain = speedup(np.full((8, 4), 1.02), np.full((8, 4), 1.0))
    assert gain.ratio == pytest.approx(1.02)
    assert not gain.is_measurable
    assert speedup_over_sessions([np.full((8, 4), 1.02)], [np.full((8, 4), 1.0)]) == gain


def test_what_slows_both_for_a_while_cancels_out():
    drift = np.where(np.arange(40) < 20, 1.0, 3.0)  # another program starts half-way
    together = speedup(noisy(1.1, seed=1, drift=drift), noisy(1.0, seed=2, drift=drift))
    assert together.is_measurable
    assert together.high - together.low < 0.2
    apart = speedup(noisy(1.1, seed=1, drift=drift), noisy(1.0, seed=2, drift=drift[::-1]))
    assert not apart.is_measurable


def test_blocks_must_come_in_pairs():
    with pytest.raises(ValueError, match="come in pairs"):
        speedup(np.ones((3, 2)), np.ones((4, 2)))
