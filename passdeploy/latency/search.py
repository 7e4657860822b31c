"""Search for the plan that meets a latency: plan by the table, build, measure, correct, repeat.

A table is least accurate for the networks that a planner prefers, so each plan is built and timed in turns with the
dense network; the ratio of measured to predicted latency corrects the table. A plan far off is made again, one that is
nearly right is changed in a few widths, so that what was measured still holds. A plan that is faster than asked is
corrected as well, since it gave away accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt

import torch

from passdeploy.channels.allocation import Budget, choose_channels
from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup, ChannelMap
from passdeploy.channels.plan import Plan, Scores
from passdeploy.errors import BudgetError, UsageError, percent
from passdeploy.latency.knapsack import adjust, allocate, allocate_fastest
from passdeploy.latency.latency_cost import NS_PER_MS, with_latency
from passdeploy.latency.network_timing import SLOW_TO_BUILD, LatencySampler
from passdeploy.latency.table import LatencyTable
from passdeploy.profiling.clock import Clock, clock_of_backend
from passdeploy.profiling.disturbances import MachineCounters, find_disturbances
from passdeploy.profiling.interleaved import BUILT_ONCE, RunnerBuilder, TimeBudget, build_in_turns, measure_sessions
from passdeploy.profiling.runners import Runner, torch_threads
from passdeploy.profiling.statistics import CallTimes, Speedup, speedup_over_sessions, summarise_times
from passdeploy.runtime.events import Stage, silent

LATENCY_TOLERANCE = 0.03  # a plan may be this much slower, or faster, than asked
MAX_PLANS = 7  # plans that are measured at most
_AIM = -0.005  # excess over the goal that plans are made for
_CLOSE_ENOUGH = 0.014  # the search ends where the excess is as near to it: measured again, the plan is within tolerance
_NEARLY_RIGHT = 0.12  # a plan whose excess is less is changed in a few widths; others are made again
_MAX_ATTEMPTS = 3  # measurements of a plan, where other programs disturb them
# Sessions per measurement. With two threads a network may be a quarter slower each time it is loaded.
_SESSIONS = 4
_SESSIONS_OF = {"ort-cuda": 1, "tensorrt": 2}  # it chooses its kernels anew in every load, which takes seconds


@dataclass(frozen=True)
class LatencyGoal:
    """Latency that the slim network must reach: a share of the dense one, or milliseconds."""

    share: float | None = None  # of the dense network's median latency
    ms: float | None = None  # milliseconds of one batch

    def __post_init__(self) -> None:
        asked = self.share if self.ms is None else self.ms
        if asked is None or asked <= 0 or (self.share is not None and self.ms is not None):
            raise UsageError(f"a latency of {asked} makes no sense: ask for a share or for milliseconds above zero.")

    @property
    def amount(self) -> float:
        """The number that was asked for: a share or milliseconds."""
        return float(self.share if self.ms is None else self.ms)  # type: ignore[arg-type]

    def of(self, slim_ms: float, share: float) -> float:
        """Return the one of both that is in the unit that was asked for."""
        return share if self.ms is None else slim_ms

    def __str__(self) -> str:
        return f"{percent(self.share)} of the dense network's latency" if self.ms is None else f"{self.ms:g} ms"


@dataclass(frozen=True)
class MeasuredPlan:
    """Plan that was built and measured."""

    plan: Plan
    predicted: float  # latency in the unit of the goal, by the table and the correction before this measurement
    measured: float  # latency in the unit of the goal
    excess: float  # measured / goal - 1; negative: faster than asked
    slim_ms: float
    dense_ms: float
    speedup: Speedup  # of the slim network over the dense one, with its confidence interval


@dataclass(frozen=True)
class _Attempt:
    """Times of the calls of both networks, by session, and what disturbed them."""

    dense: list[CallTimes]
    slim: list[CallTimes]
    disturbances: tuple[str, ...]


@dataclass(frozen=True)
class SearchResult:
    """Best plan that meets the goal, and all plans that were measured."""

    best: MeasuredPlan
    trials: tuple[MeasuredPlan, ...]  # in order; the first is made by the table without correction


def plan_by_table(
    scores: Scores,
    groups: Sequence[ChannelGroup],
    costs: CostModel,
    limit_ns: int,
    *,
    round_to: int,
    allocation: str = "global",
) -> Plan:
    """Plan by a latency table alone.

    Args:
        scores: of the channels, and of the blocks that may be skipped.
        groups: that may be cut.
        costs: with latency, see `with_latency`.
        limit_ns: latency of the plan at most, in nanoseconds as the table predicts it.
        round_to: layer widths become multiples of this.
        allocation: `global` (the knapsack) or `uniform` (the same share of every group).

    Raises:
        BudgetError: no widths are fast enough.
    """
    if allocation == "uniform":
        budget = Budget("latency", limit_ns)
        return choose_channels(scores, groups, costs, budget, round_to=round_to, allocation="uniform")
    return allocate(scores, groups, costs, limit_ns, round_to=round_to)


class LatencySearch:
    """Search for plans of one network on one backend.

    Args:
        sampler: builds and times networks.
        channels: of the network; its cost model need not include latency.
        table: of the network, on this machine.
        round_to: layer widths become multiples of this.
        threads: of PyTorch while it is timed.
        allocation: `global` (the knapsack) or `uniform` (the same share of every group).
        build_delivered: plan -> builder of its network as it is delivered, weights included; a plan that meets the goal
            is measured once more with that network. Without it, the sampler's network counts.
        seconds: of every measurement, both networks together.
        device: that they run on; it decides the clock.
        clock: another source of time, for tests.
    """

    def __init__(
        self,
        sampler: LatencySampler,
        channels: ChannelMap,
        table: LatencyTable,
        *,
        round_to: int,
        threads: int = 1,
        allocation: str = "global",
        build_delivered: Callable[[Plan], RunnerBuilder] | None = None,
        seconds: float = 3.0,
        device: torch.device | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._sampler, self._channels, self._table, self._round_to = sampler, channels, table, round_to
        self._threads, self._time = threads, TimeBudget(seconds=seconds)
        device = device or torch.device("cpu")
        self._device, self._clock = device, clock or clock_of_backend(sampler.backend, device)
        self._sessions = 1 if sampler.backend in BUILT_ONCE else _SESSIONS_OF.get(sampler.backend, _SESSIONS)
        self._allocation, self._confirm = allocation, build_delivered
        self._costs = with_latency(channels.costs, table)

    def find(self, scores: Scores, goal: LatencyGoal, stage: Stage | None = None) -> SearchResult:
        """Find the plan that keeps the most of `scores` and is measured to meet the goal.

        Raises:
            BudgetError: the goal cannot be reached (the message says what can), or the plan would be slower than the
                dense network.
        """
        stage = stage or Stage("plan", silent)
        trials = list[MeasuredPlan]()
        while len(trials) < MAX_PLANS:
            plan = self._next_plan(scores, goal, trials)
            if plan is None:
                break  # no width is left to change
            trials.append(self._try(plan, goal, _correction_of(trials)))
            stage.step(len(trials), MAX_PLANS, asked=goal.amount, found=trials[-1].measured)
            if min(map(_distance, trials)) <= _CLOSE_ENOUGH:
                break
        return SearchResult(_best_of(trials, goal), tuple(trials))

    def plan(self, scores: Scores, goal: LatencyGoal, correction: float = 1.0) -> Plan:
        """Plan by the table, whose predictions are multiplied by `correction`.

        Raises:
            BudgetError: no widths are fast enough.
        """
        limit = self._aimed_ns(goal, correction)
        return plan_by_table(
            scores,
            self._channels.prunable,
            self._costs,
            limit,
            round_to=self._round_to,
            allocation=self._allocation,
        )

    def measured(self, plan: Plan, goal: LatencyGoal) -> MeasuredPlan:
        """Measure a plan that is given, with its network as it is delivered."""
        return self.measure_plan(plan, goal, build=None if self._confirm is None else self._confirm(plan))

    def _next_plan(self, scores: Scores, goal: LatencyGoal, trials: Sequence[MeasuredPlan]) -> Plan | None:
        """Make the plan to measure next; None if there is none that was not measured."""
        groups = self._channels.prunable
        nearest = min(trials, key=_distance, default=None)
        if nearest is not None and _distance(nearest) <= _NEARLY_RIGHT and self._allocation == "global":
            table_ms = self._table.predict_ms(nearest.plan.widths())
            wanted = int(NS_PER_MS * table_ms * (1 + _AIM) / (1 + nearest.excess))
            known = [trial.plan for trial in trials]
            return adjust(nearest.plan, scores, groups, self._costs, wanted, round_to=self._round_to, known=known)
        for correction in (_correction_of(trials), self._correction_between(goal, trials)):
            if correction is not None and (plan := self._new_plan(scores, goal, correction, trials)) is not None:
                return plan
        return None

    def _new_plan(
        self, scores: Scores, goal: LatencyGoal, correction: float, trials: Sequence[MeasuredPlan]
    ) -> Plan | None:
        """Plan by the corrected table; None if that plan was measured.

        Where no plan is fast enough by the table, which may be wrong, it is the fastest of all.
        """
        try:
            plan = self.plan(scores, goal, correction)
        except BudgetError:
            if self._allocation == "uniform":
                if trials:
                    return None
                raise
            plan = allocate_fastest(scores, self._channels.prunable, self._costs, round_to=self._round_to)
        return plan if all(plan.widths() != trial.plan.widths() for trial in trials) else None

    def _correction_between(self, goal: LatencyGoal, trials: Sequence[MeasuredPlan]) -> float | None:
        """Return the correction for a plan between those that are too fast and too slow; None without both."""
        fast = [self._table.predict_ms(trial.plan.widths()) for trial in trials if trial.excess < _AIM]
        slow = [self._table.predict_ms(trial.plan.widths()) for trial in trials if trial.excess > _AIM]
        if not fast or not slow or max(fast) >= min(slow):
            return None
        return self._aimed_ns(goal, 1.0) / NS_PER_MS / sqrt(max(fast) * min(slow))

    def _try(self, plan: Plan, goal: LatencyGoal, correction: float) -> MeasuredPlan:
        """Measure a plan; if it may be the one to keep, as it is delivered."""
        if self._confirm is not None and self._sampler.backend in SLOW_TO_BUILD:
            return self.measure_plan(plan, goal, correction, self._confirm(plan))
        trial = self.measure_plan(plan, goal, correction)
        if self._confirm is not None and trial.excess <= LATENCY_TOLERANCE:
            trial = self.measure_plan(plan, goal, correction, self._confirm(plan))
        return trial

    def _aimed_ns(self, goal: LatencyGoal, correction: float) -> int:
        """Return the nanoseconds by the table at which a plan is expected to meet the goal."""
        unit_ms = self._table.dense_ms if goal.ms is None else 1.0
        return int(NS_PER_MS * (1 + _AIM) * goal.amount * unit_ms / correction)

    def measure_plan(
        self, plan: Plan, goal: LatencyGoal, correction: float = 1.0, build: RunnerBuilder | None = None
    ) -> MeasuredPlan:
        """Time the network of `plan`, loaded by `build` or else by the sampler, in turns with the dense one."""
        widths, table_ms = plan.widths(), self._table.predict_ms(plan.widths())
        predicted = correction * goal.of(table_ms, table_ms / self._table.dense_ms)
        both = build_in_turns(
            partial(self._sampler.runner, {}, "dense"), build or partial(self._sampler.runner, widths, "slim")
        )
        attempts = list[_Attempt]()
        while len(attempts) < _MAX_ATTEMPTS and (not attempts or attempts[-1].disturbances):
            attempts.append(self._measure_once(both))
        least = min(attempts, key=lambda attempt: len(attempt.disturbances))
        dense, slim = least.dense, least.slim
        slim_ms, dense_ms = summarise_times(*slim).median_ms, summarise_times(*dense).median_ms
        speedup = speedup_over_sessions(dense, slim)
        measured = goal.of(slim_ms, 1 / speedup.ratio)
        return MeasuredPlan(plan, predicted, measured, measured / goal.amount - 1, slim_ms, dense_ms, speedup)

    def _measure_once(self, build_both: Callable[[int], Sequence[Runner]]) -> _Attempt:
        """Time both networks in all sessions, and note what disturbed them."""
        before = MachineCounters.now(self._device)

        def build_session(session: int) -> Sequence[Runner]:
            nonlocal before
            runners = build_both(session)
            if session == 0:  # not earlier: the compiler's own processes would count as disturbances
                before = MachineCounters.now(self._device)
            return runners

        with torch_threads(self._threads):
            dense, slim = measure_sessions(build_session, self._clock, self._time, sessions=self._sessions)
        return _Attempt(dense, slim, find_disturbances(before, MachineCounters.now(self._device)))


def _correction_of(trials: Sequence[MeasuredPlan]) -> float:
    """Return the factor of the table's predictions by the last measurement; `predicted` has the one before in it."""
    correction = 1.0
    for trial in trials:
        correction *= trial.measured / trial.predicted
    return correction


def _distance(trial: MeasuredPlan) -> float:
    """Return how far a plan is from the excess that plans are made for."""
    return abs(trial.excess - _AIM)


def _best_of(trials: Sequence[MeasuredPlan], goal: LatencyGoal) -> MeasuredPlan:
    """Choose the plan nearest to the goal, else the slowest of those that are faster than asked; else raise."""
    within = [trial for trial in trials if abs(trial.excess) <= LATENCY_TOLERANCE]
    faster = [trial for trial in trials if trial.excess < 0]
    if not within and not faster:
        nearest = min(trials, key=lambda trial: trial.excess)
        raise BudgetError(
            f"asked for {goal}, but the fastest that can be reached is {nearest.slim_ms:.3g} ms, "
            f"{percent(nearest.slim_ms / nearest.dense_ms)} of the dense network's {nearest.dense_ms:.3g} ms: "
            f"the nearest of {len(trials)} plans that were measured.\n"
            "Ask for more, or measure on a quieter machine."
        )
    best = min(within, key=_distance) if within else max(faster, key=lambda trial: trial.excess)
    if best.speedup.ratio < 1.0:
        raise BudgetError(
            f"the plan is slower than the dense network: {best.slim_ms:.3g} ms against {best.dense_ms:.3g} ms.\n"
            "Fewer channels do not help here; leave prune.round_to at auto, or ask for less."
        )
    return best
