from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.errors import BudgetError, UsageError
from passdeploy.latency.search import MOST_TRIALS, TOLERANCE, LatencyGoal, LatencySearch
from passdeploy.latency.sweep import sweep_round
from tests.profiling.fakes import FakeRunner

from .fakes import FakeProber, chain, table_of


@pytest.fixture(scope="module")
def channels() -> ChannelMap:
    return chain()


@pytest.fixture(scope="module")
def scores(channels: ChannelMap) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    return {g.name: torch.rand(g.width, generator=chance) for g in channels.prunable}


def search_at(
    channels: ChannelMap, sampler: FakeProber, known: FakeProber | None = None, **more: object
) -> LatencySearch:
    """Plans with the table of `known`, measures with `sampler`."""
    table = table_of(known or sampler, channels)
    return LatencySearch(sampler, channels, table, round_to=8, seconds=0.1, clock=sampler.clock, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.75, 0.5, 0.35])
def test_a_share_is_met_at_once_where_the_table_is_right(share: float, channels: ChannelMap, scores):
    met = search_at(channels, FakeProber()).find(scores, LatencyGoal(share=share))
    assert 0.88 * share <= met.trial.found <= (1 + TOLERANCE) * share
    assert met.trial.predicted == pytest.approx(met.trial.found, rel=0.08)
    assert len(met.trials) <= 2


def test_a_table_that_is_wrong_is_corrected_by_what_is_measured(channels: ChannelMap, scores):
    def narrow_is_slow(widths: Mapping[str, int]) -> float:
        return 1.0 if len(widths) == 0 else 1.25

    met = search_at(channels, FakeProber(surcharge=narrow_is_slow), FakeProber()).find(scores, LatencyGoal(share=0.5))
    assert met.trials[0].off > 0.15  # by the table alone it would have been missed
    assert met.trial.found <= (1 + TOLERANCE) * 0.5
    assert 1 < len(met.trials) <= MOST_TRIALS


def test_milliseconds_are_met_too(channels: ChannelMap, scores):
    sampler = FakeProber()
    asked = 0.6 * sampler.total({})
    met = search_at(channels, sampler).find(scores, LatencyGoal(ms=asked))
    assert met.trial.slim_ms <= (1 + TOLERANCE) * asked
    assert met.trial.found == met.trial.slim_ms


def test_a_network_that_does_not_get_faster_is_refused(channels: ChannelMap, scores):
    stubborn = FakeProber(surcharge=lambda widths: 1.0 if not widths else 8.0)
    with pytest.raises(BudgetError, match="nearest of 1 plans that were measured takes"):
        search_at(channels, stubborn, FakeProber()).find(scores, LatencyGoal(share=0.3))


def test_a_plan_slower_than_the_dense_network_is_refused_even_if_the_milliseconds_are_met(channels, scores):
    slow = FakeProber(surcharge=lambda widths: 1.0 if not widths else 4.0)
    with pytest.raises(BudgetError, match="slower than the dense network"):
        search_at(channels, slow, FakeProber()).find(scores, LatencyGoal(ms=1.5 * slow.total({})))


def test_what_will_be_used_is_what_counts(channels: ChannelMap, scores):
    sampler = FakeProber()
    built = []

    def confirm(plan: Plan) -> Callable[[], FakeRunner]:
        built.append(plan)
        return lambda: FakeRunner("slim", sampler.clock, 1.1 * sampler.total(plan.widths()))

    met = search_at(channels, sampler, confirm=confirm).find(scores, LatencyGoal(share=0.5))
    assert met.trial.found <= (1 + TOLERANCE) * 0.5
    assert met.trial.slim_ms == pytest.approx(1.1 * sampler.total(met.trial.plan.widths()))
    assert built[-1] == met.trial.plan


@pytest.mark.parametrize("asked", [{"share": 0.0}, {"ms": -1.0}, {}, {"share": 0.5, "ms": 1.0}])
def test_a_request_that_makes_no_sense_is_refused(asked: dict[str, float]):
    with pytest.raises(UsageError, match="makes no sense"):
        LatencyGoal(**asked)


def test_a_uniform_plan_keeps_the_same_share_of_every_group(channels: ChannelMap, scores):
    met = search_at(channels, FakeProber(), allocation="uniform").find(scores, LatencyGoal(share=0.5))
    shares = [len(met.trial.plan.kept[g.name]) / g.width for g in channels.prunable]
    assert max(shares) - min(shares) < 0.15


def test_a_sweep_says_which_rounding_keeps_the_most(channels: ChannelMap, scores):
    sampler = FakeProber()
    table = table_of(sampler, channels)
    rows = sweep_round(
        [1, 8, 64],
        lambda step: LatencySearch(sampler, channels, table, round_to=step, seconds=0.1, clock=sampler.clock),
        scores,
        LatencyGoal(share=0.2),
    )
    assert [row["round_to"] for row in rows] == [1, 8, 64]
    assert "the fastest that can be reached" in rows[2]["refused"]
    assert rows[1]["achieved"] <= 0.2 * (1 + TOLERANCE)
    assert 0 < rows[1]["kept"] < 1


def test_a_plan_is_measured_again_where_another_program_disturbed_it(
    channels: ChannelMap, scores, monkeypatch: pytest.MonkeyPatch
):
    happened = iter([("disturbed",), ("disturbed",), ()])
    measured: list[int] = []
    monkeypatch.setattr("passdeploy.latency.search.disturbances", lambda before, after: next(happened))
    monkeypatch.setattr(
        "passdeploy.latency.search.measure_sessions",
        lambda *_, **__: measured.append(1) or ([torch.ones(8, 1).numpy()], [torch.full((8, 1), 0.5).numpy()]),
    )
    target = search_at(channels, FakeProber())
    trial = target.try_out(target.plan(scores, LatencyGoal(share=0.5)), LatencyGoal(share=0.5))
    assert trial.found == pytest.approx(0.5)
    assert len(measured) == 3


def test_what_counts_is_how_fast_a_network_is_wherever_it_is_loaded(channels: ChannelMap, scores):
    sampler = FakeProber()
    loads: dict[str, int] = {}

    def load(widths: Mapping[str, int], name: str) -> FakeRunner:
        loads[name] = loads.get(name, 0) + 1
        unlucky = name == "slim" and loads[name] % 2 == 0
        return FakeRunner(name, sampler.clock, sampler.total(widths) * (1.44 if unlucky else 1.0))

    target = search_at(channels, sampler)
    sampler.runner = load  # type: ignore[method-assign]
    trial = target.try_out(target.plan(scores, LatencyGoal(share=0.5)), LatencyGoal(share=0.5))
    assert loads["slim"] == loads["dense"] > 1
    assert trial.found / trial.predicted == pytest.approx(1.2, rel=0.02)  # the geometric mean of 1 and 1.44
