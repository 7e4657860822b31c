"""Meet a latency: plan by the table, build, measure against the dense network, correct, until it is as fast as asked.

A table is never quite right about the very networks that a planner likes best, so the plan is built and timed in turns
with the dense network, what was measured over what was predicted corrects the table, and the plan is made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from passdeploy.channels.allocation import Budget, choose_channels
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan, Scores
from passdeploy.errors import BudgetError, UsageError
from passdeploy.latency.cost import NS_PER_MS, LatencyCost
from passdeploy.latency.knapsack import allocate
from passdeploy.latency.network_timing import LatencySampler
from passdeploy.latency.table import LatencyTable
from passdeploy.profiling.clock import Clock, clock_for
from passdeploy.profiling.disturbances import MachineCounters, disturbances
from passdeploy.profiling.interleaved import BUILT_ONCE, Build, TimeBudget, in_turns, measure_sessions
from passdeploy.profiling.runners import torch_threads
from passdeploy.profiling.statistics import Speedup, speedup_over, summarise_times
from passdeploy.runtime.events import Stage, silent

TOLERANCE = 0.03  # a plan may be this much slower than asked
MOST_TRIALS = 6
_AIM = 0.975  # of what is asked: the middle of what ends the search, a little on the fast side,
_NEAR_ENOUGH = 0.05  # so much faster at most
_PATIENCE = 3  # measurements of a plan, where another program disturbs them
_SESSIONS = 4  # of each: with two threads a network may be a quarter slower where it is loaded anew
_SURELY = 0.005  # and so much at least: measured again, it should still be as fast as asked


@dataclass(frozen=True)
class LatencyGoal:
    """How fast the slim network must be: one of the two."""

    share: float | None = None  # of the dense network's median latency
    ms: float | None = None  # milliseconds of one batch

    def __post_init__(self) -> None:
        asked = self.share if self.ms is None else self.ms
        if asked is None or asked <= 0 or (self.share is not None and self.ms is not None):
            raise UsageError(f"a latency of {asked} makes no sense: ask for a share or for milliseconds above zero.")

    @property
    def amount(self) -> float:
        """The number that was asked for."""
        return float(self.share if self.ms is None else self.ms)  # type: ignore[arg-type]

    def of(self, slim_ms: float, share: float) -> float:
        """What a slim network has, in the unit that was asked for."""
        return share if self.ms is None else slim_ms

    def __str__(self) -> str:
        return f"{self.share:.1%} of the dense network's latency" if self.ms is None else f"{self.ms:g} ms"


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan that was built and measured."""

    plan: Plan
    predicted: float  # in the unit that was asked for, by the table and what was known before this trial
    found: float  # measured
    off: float  # how much slower than asked, relative; negative: faster
    slim_ms: float
    dense_ms: float
    gained: Speedup  # of the slim network over the dense one, with its interval


@dataclass(frozen=True)
class SearchResult:
    """A plan that is as fast as asked."""

    trial: MeasuredPlan
    trials: tuple[MeasuredPlan, ...]  # all of them, in order; the first is the table's own


class LatencySearch:
    """Plans for latency on one backend.

    Args:
        prober: builds and times networks.
        channels: of the network; its cost model need not know of latency.
        table: of the network, on this machine.
        round_to: layer widths become multiples of this.
        threads: of PyTorch while it is timed.
        allocation: `global` (the knapsack) or `uniform` (the same share of every group).
        confirm: for a plan, what loads its network as it will be used, weights and all; a plan counts once that was
            measured. Without it, what the prober builds counts.
        seconds: of every measurement, both networks together.
        device: what they run on; it says who tells the time.
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
        confirm: Callable[[Plan], Build] | None = None,
        seconds: float = 3.0,
        device: torch.device | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._sampler, self._channels, self._table, self._round_to = sampler, channels, table, round_to
        self._threads, self._time = threads, TimeBudget(seconds=seconds)
        device = device or torch.device("cpu")
        self._clock, self._is_on_gpu = clock or clock_for(device), device.type == "cuda"
        self._sessions = 1 if sampler.backend in BUILT_ONCE else _SESSIONS
        self._allocation, self._confirm = allocation, confirm
        self._costs = replace(channels.costs, latency=LatencyCost(table, list(channels.costs.widths)))

    def find(self, scores: Scores, request: LatencyGoal, stage: Stage | None = None) -> SearchResult:
        """The plan that keeps the most of `scores` and is measured to be as fast as asked.

        Raises:
            BudgetError: it cannot be reached, and what can; or the plan would be slower than the dense network.
        """
        stage = stage or Stage("plan", silent)
        trials, tried, correction = list[MeasuredPlan](), set[tuple[int, ...]](), 1.0
        while len(trials) < MOST_TRIALS:
            try:
                plan = self.plan(scores, request, correction)
            except BudgetError:
                if not trials:
                    raise
                break  # not with what is known by now
            widths = tuple(plan.widths().values())
            if widths in tried:
                break  # nothing lies between what was tried
            tried.add(widths)
            trial = self.try_out(plan, request, correction)
            if self._confirm is not None and trial.off <= TOLERANCE:
                trial = self.try_out(plan, request, correction, self._confirm(plan))
            trials.append(trial)
            stage.step(len(trials), MOST_TRIALS, asked=request.amount, found=trial.found)
            if -_NEAR_ENOUGH <= trial.off <= -_SURELY:
                break
            correction *= trials[-1].found / trials[-1].predicted
        fit = [trial for trial in trials if trial.off <= TOLERANCE]
        if not fit:
            best = min(trials, key=lambda trial: trial.off)
            raise BudgetError(
                f"asked for {request}; the nearest of {len(trials)} plans that were measured takes "
                f"{best.slim_ms:.3g} ms, {best.slim_ms / best.dense_ms:.1%} of the dense network's "
                f"{best.dense_ms:.3g} ms.\n"
                "Ask for more, or measure on a quieter machine."
            )
        sure = [trial for trial in fit if trial.off <= -_SURELY]
        met = max(sure, key=lambda trial: trial.off) if sure else min(fit, key=lambda trial: trial.off)
        if met.gained.ratio < 1.0:
            raise BudgetError(
                f"the plan is slower than the dense network: {met.slim_ms:.3g} ms against {met.dense_ms:.3g} ms.\n"
                "Fewer channels do not help here; leave prune.round_to at auto, or ask for less."
            )
        return SearchResult(met, tuple(trials))

    def plan(self, scores: Scores, request: LatencyGoal, correction: float = 1.0) -> Plan:
        """By the table: what is measured is taken to be `correction` times what the table says.

        Raises:
            BudgetError: no widths are fast enough.
        """
        whole = self._table.dense_ms if request.ms is None else 1.0
        limit = int(NS_PER_MS * _AIM * request.amount * whole / correction)
        if self._allocation == "uniform":
            budget = Budget("latency", limit)
            return choose_channels(
                scores, self._channels.prunable, self._costs, budget, round_to=self._round_to, allocation="uniform"
            )
        return allocate(scores, self._channels.prunable, self._costs, limit, round_to=self._round_to)

    def try_out(
        self, plan: Plan, request: LatencyGoal, correction: float = 1.0, build: Build | None = None
    ) -> MeasuredPlan:
        """Time the network of `plan`, what `build` or the prober loads, in turns with the dense one."""
        widths, says = plan.widths(), self._table.predict_ms(plan.widths())
        predicted = correction * request.of(says, says / self._table.dense_ms)
        both = in_turns(
            partial(self._sampler.runner, {}, "dense"), build or partial(self._sampler.runner, widths, "slim")
        )
        for _ in range(_PATIENCE):
            before = MachineCounters.now(with_gpus=self._is_on_gpu)
            with torch_threads(self._threads):
                dense, slim = measure_sessions(both, self._clock, self._time, sessions=self._sessions)
            if not disturbances(before, MachineCounters.now(with_gpus=self._is_on_gpu)):
                break
        gained, slim_ms, dense_ms = (
            speedup_over(dense, slim),
            summarise_times(*slim).median_ms,
            summarise_times(*dense).median_ms,
        )
        found = request.of(slim_ms, 1 / gained.ratio)
        return MeasuredPlan(plan, predicted, found, found / request.amount - 1, slim_ms, dense_ms, gained)
