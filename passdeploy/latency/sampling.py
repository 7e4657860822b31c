"""Measure a network's latency at many widths and build its latency table from the measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, nan
from time import perf_counter

import numpy as np
import torch

from passdeploy.channels.blocks import outermost, presence
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.widths import candidate_widths
from passdeploy.errors import BudgetError
from passdeploy.latency.knapsack import allocate
from passdeploy.latency.latency_cost import NS_PER_MS, with_latency
from passdeploy.latency.measurement_context import MeasurementContext
from passdeploy.latency.network_timing import (
    SLOW_TO_BUILD,
    LatencySampler,
    NetworkTiming,
    TracingSampler,
    median_ms,
    merge_timings,
)
from passdeploy.latency.table import LatencyTable
from passdeploy.profiling.runners import torch_threads
from passdeploy.runtime.events import Stage, silent
from passdeploy.runtime.seeds import generator

_TRACE_SECONDS = 0.2
_MOST_SKIPPED = 0.7  # share of its blocks that a network of random widths skips at most, on average
_SHARE_SPREAD = 0.5  # largest difference between a group's share of channels and its network's
_BASELINE_SECONDS, _BASELINE_CALLS = 0.3, 3
_UNDISTURBED_QUANTILE = 0.25  # of the baseline times: the speed of the machine when nothing disturbs it
_MOST_SECONDS = {"compile": 76.0, "ort-cuda": 76.0, "tensorrt": 180.0}  # one more network may be built after that
_RANDOM_SHARE = 0.75  # of that time at most goes to networks of random widths, the rest to plans
_CHECKED_EVERY = 3  # networks between two looks at the error
_PLANS_IN_A_ROW = 3  # of different shares, that have to be predicted well
_SLOW_FACTOR = 1.08  # networks whose baseline times were above this times that are measured again


@dataclass(frozen=True)
class SamplingPlan:
    """Number and length of the measurements of a latency table."""

    networks: int = 18  # networks of random widths at most, the dense one among them
    fewest_networks: int = 9  # after which the error is looked at
    target_shares: tuple[float, ...] = (0.75, 0.5, 0.35, 0.75, 0.5, 0.35)  # plans for these shares of the dense latency
    repeats: int = 2  # measurements of each network; one where building takes longer than measuring
    seconds: float = 0.7  # of each measurement, where calls are short
    traced_networks: int = 12  # of which only the operators are timed, in eager PyTorch, where that needs no compiler
    small_error: float = 0.025  # held-out error, in the median, at which no more networks are measured ...
    small_largest: float = 0.15  # ... if no network is off by more than this
    small_plan_error: float = 0.03  # of the last plans of different shares, at which no more plans are measured
    most_seconds: float = 240.0  # of all measurements; later ones are left out
    fewest_measurements: int = 8  # that are made even if they take longer
    seed: int = 0  # of the random widths and scores

    @classmethod
    def of(cls, backend: str) -> SamplingPlan:
        """Return the plan for a backend: fewer networks, each measured once, where building takes the time."""
        if backend not in SLOW_TO_BUILD:
            return cls()
        return cls(
            networks=12,
            fewest_networks=6,
            repeats=1,
            small_error=0.03,
            most_seconds=_MOST_SECONDS[backend],
            fewest_measurements=5,
        )


def sample_latency(
    sampler: LatencySampler,
    channels: ChannelMap,
    context: MeasurementContext,
    plan: SamplingPlan | None = None,
    stage: Stage | None = None,
) -> LatencyTable:
    """Measure networks of many widths and build the latency table of their layers.

    How many depends on the error that is seen: networks of random widths are measured until those that the table is
    not fitted to are predicted well.

    The speed of a machine varies, and not all networks slow down alike. So the dense network is timed between any two
    measurements (its baseline times), and networks that were only measured while it was slow are measured once more.

    A planner tends to choose the networks whose latency the table underestimates most. So the last measurements are of
    plans, made for random scores by the table as it is by then, until it predicts them well.

    Args:
        sampler: builds and times the networks.
        channels: of the network; groups that are not prunable stay whole.
        context: machine, backend and settings of the measurements.
        plan: number and length of the measurements; None: `SamplingPlan.of` the backend.
        stage: receives an event after every measurement.
    """
    plan, stage = plan or SamplingPlan.of(sampler.backend), stage or Stage("table", silent)
    widths = {group.name: group.width for group in channels.prunable}
    alike = alike_groups(channels) if sampler.backend in SLOW_TO_BUILD else None
    random_widths: list[Mapping[str, int]] = [
        {},
        *draw_widths(channels, plan.networks - 1, sampler.block, seed=plan.seed, alike=alike),
    ]
    began = perf_counter()
    sampler.measure({}, seconds=min(0.5, plan.seconds))  # a processor that was idle is slow at first
    measurements = _Measurements(sampler, context, plan)
    traced: list[NetworkTiming] = []

    def table() -> LatencyTable:
        timings = [*measurements.timings(), *traced]
        return LatencyTable.build(context, widths, sampler.block, timings, channels.costs.blocks)

    def measure(network: Mapping[str, int], share_of_time: float = 1.0) -> None:
        elapsed = perf_counter() - began
        if measurements.count < plan.fewest_measurements or elapsed <= share_of_time * plan.most_seconds:
            ms = measurements.add(network)
            expected = (plan.networks + len(plan.target_shares)) * plan.repeats
            stage.step(min(measurements.count, expected), expected, ms=ms)

    def is_good() -> bool:
        median, largest = table().error
        return median <= plan.small_error and largest <= plan.small_largest

    if isinstance(sampler, TracingSampler) and sampler.traces_elsewhere:
        for drawn in draw_widths(channels, plan.traced_networks, sampler.block, seed=plan.seed + 1):
            traced.append(NetworkTiming(drawn, nan, sampler.trace(drawn, seconds=_TRACE_SECONDS)))
    used: list[Mapping[str, int]] = []
    for network in random_widths:
        if len(used) >= plan.fewest_networks and len(used) % _CHECKED_EVERY == 0 and is_good():
            break
        used.append(network)
        measure(network, _RANDOM_SHARE)
    for network in used * (plan.repeats - 1):
        measure(network, _RANDOM_SHARE)
    for network in measurements.measured_while_slow():
        measure(network, _RANDOM_SHARE)
    errors: list[float] = []  # of the table's predictions of plans, each before its plan was measured
    for number, share in enumerate(plan.target_shares):
        by_now = table()
        try:
            planned = _plan_widths(by_now, channels, share, sampler.block, plan.seed + number)
        except BudgetError:
            continue  # no widths are so fast
        for _ in range(plan.repeats):
            measure(planned)
        if (ms := measurements.total_ms(planned)) is not None:
            errors.append(abs(by_now.predict_ms(planned) / ms - 1))
        if len(errors) >= _PLANS_IN_A_ROW and max(errors[-_PLANS_IN_A_ROW:]) <= plan.small_plan_error:
            break
    return table()


class _Measurements:
    """Timings of networks so far, with the baseline times around each."""

    def __init__(self, sampler: LatencySampler, context: MeasurementContext, plan: SamplingPlan) -> None:
        self._sampler, self._context, self._plan, self.count = sampler, context, plan, 0
        self._dense = sampler.runner({}, "dense")
        self._baseline_times = [self._time_baseline()]  # ms, before the first measurement and after each
        self._timings: dict[tuple[tuple[str, int], ...], NetworkTiming] = {}
        self._baseline_at: dict[tuple[tuple[str, int], ...], float] = {}  # ms, around the least disturbed measurement

    def add(self, widths: Mapping[str, int]) -> float:
        """Measure the network at `widths` once; returns the milliseconds of a call."""
        timing, key = self._sampler.measure(widths, seconds=self._plan.seconds), tuple(widths.items())
        self._baseline_times.append(self._time_baseline())
        self._timings[key] = merge_timings(self._timings[key], timing) if key in self._timings else timing
        self._baseline_at[key] = min(self._baseline_at.get(key, inf), max(self._baseline_times[-2:]))
        self.count += 1
        return timing.total_ms

    def total_ms(self, widths: Mapping[str, int]) -> float | None:
        """Return the milliseconds of a call of the network at `widths`; None if it was not measured."""
        timing = self._timings.get(tuple(widths.items()))
        return None if timing is None else timing.total_ms

    def measured_while_slow(self) -> list[Mapping[str, int]]:
        """List the widths that were only measured while the machine was slow."""
        limit = _SLOW_FACTOR * float(np.quantile(self._baseline_times, _UNDISTURBED_QUANTILE))
        return [self._timings[key].widths for key, baseline_ms in self._baseline_at.items() if baseline_ms > limit]

    def timings(self) -> list[NetworkTiming]:
        """Return one timing for every network, the dense one first."""
        # Other networks keep the shortest of a few measurements; on average that is this quantile of all of them.
        dense_ms = float(np.quantile(self._baseline_times, 1 / (self._plan.repeats + 1)))
        return [
            replace(timing, total_ms=dense_ms) if not timing.widths else timing for timing in self._timings.values()
        ]

    def _time_baseline(self) -> float:
        seconds = min(_BASELINE_SECONDS, self._plan.seconds)
        with torch_threads(self._context.threads):
            return median_ms(self._dense.run, self._sampler.clock, seconds=seconds, fewest=_BASELINE_CALLS)


def _plan_widths(table: LatencyTable, channels: ChannelMap, share: float, block: int, seed: int) -> dict[str, int]:
    """Plan the widths for a share of the dense latency, with random scores like those of a trained network."""
    costs = with_latency(channels.costs, table)
    scores = {}
    for group in channels.prunable:
        draws = generator("aim", seed, group.name)
        level = torch.randn((), generator=draws).exp()  # layers differ in importance
        scores[group.name] = level * (0.5 + torch.rand(group.width, generator=draws))
    for skippable in costs.blocks:
        name = presence(skippable.name)
        inside = sum(float(scores[group].sum()) for group in skippable.groups if group in scores)
        scores[name] = inside * 2 * torch.rand(1, generator=generator("aim", seed, name))
    limit = int(NS_PER_MS * share * table.dense_ms)
    return allocate(scores, channels.groups, costs, limit, round_to=block).widths()


def alike_groups(channels: ChannelMap) -> dict[str, str]:
    """Map every prunable group to the first one of the same width and with the same share of the multiply-adds.

    Such groups are those of repeated blocks. Given equal widths, their layers are the same, which a compiler or a
    builder makes once; and they share one layer model of the table anyway.
    """
    per_channel = channels.costs.macs.gradient(channels.costs.vector({}))
    macs = dict(zip(channels.costs.widths, per_channel.tolist(), strict=True))
    first: dict[tuple[int, float], str] = {}
    return {group.name: first.setdefault((group.width, macs[group.name]), group.name) for group in channels.prunable}


def draw_widths(
    channels: ChannelMap,
    count: int,
    block: int,
    *,
    seed: int,
    alike: Mapping[str, str] | None = None,
) -> list[dict[str, int]]:
    """Draw widths of `count` networks from narrow to wide: the share of each group around its network's share.

    Every other network skips some blocks besides.

    Args:
        channels: of the network.
        count: of networks.
        block: channels that kernels compute together.
        seed: of the draws.
        alike: name of a group -> the group whose width it takes as well.
    """
    random, of_blocks = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    networks = []
    for number, share in enumerate(random.permutation(np.linspace(0.15, 0.95, max(count, 1)))[:count]):
        widths: dict[str, int] = {}
        for group in channels.groups:
            if group.is_prunable:
                candidates = candidate_widths(group, block, is_strict=True)
                wanted = np.clip(share + random.uniform(-_SHARE_SPREAD, _SHARE_SPREAD), 0, 1) * group.width
                first = (alike or {}).get(group.name, group.name)
                widths[group.name] = widths.get(first, int(candidates[np.abs(candidates - wanted).argmin()]))
        if number % 2:
            most_skipped = of_blocks.uniform(0, _MOST_SKIPPED)
            skipped = [one for one in channels.costs.blocks if of_blocks.uniform() < most_skipped]
            widths |= {presence(one.name): 0 for one in outermost(skipped)}
        networks.append(widths)
    return networks
