"""Sample a network's latency at chosen widths, and fit its latency table to what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from time import perf_counter

import numpy as np
import torch

from passdeploy.channels.groups import ChannelGroup, ChannelMap
from passdeploy.channels.widths import candidate_widths
from passdeploy.errors import BudgetError
from passdeploy.latency.cost import NS_PER_MS, LatencyCost
from passdeploy.latency.hardware import MeasurementContext
from passdeploy.latency.knapsack import allocate
from passdeploy.latency.network_timing import LatencySampler, NetworkTiming, median_ms, undisturbed
from passdeploy.latency.table import LatencyTable
from passdeploy.profiling.runners import torch_threads
from passdeploy.runtime.events import Stage, silent
from passdeploy.runtime.seeds import generator

_SPREAD = 0.5  # how far a group's share strays from its network's
_PACE_SECONDS, _FEWEST_PACES = 0.3, 3
_USUAL = 0.25  # quantile of the paces that tells how fast the machine is when nothing disturbs it
_SLOW = 1.08  # times that; what is seen then is looked at again


@dataclass(frozen=True)
class SamplingPlan:
    """How much to look."""

    measurements: int = 18  # networks of drawn widths, the dense one among them
    target_shares: tuple[float, ...] = (0.75, 0.5, 0.35, 0.75, 0.5, 0.35)  # and plans for these shares of its latency
    rounds: int = 2  # times that each is looked at
    seconds: float = 0.7  # each time, where its calls are short
    most_seconds: float = 240.0  # for all of them; what is not looked at by then is left out, but not below `least`
    least: int = 8
    seed: int = 0


def sample_latency(
    sampler: LatencySampler,
    channels: ChannelMap,
    context: MeasurementContext,
    plan: SamplingPlan | None = None,
    stage: Stage | None = None,
) -> LatencyTable:
    """Look at networks of many widths, and make the table of their layers.

    A machine is faster now and slower then, and not all networks suffer alike. So the dense network is timed between
    any two looks, and what was seen only while it was slow is looked at once more.

    A planner takes the network that a table flatters most. So the last looks are at plans, for scores that are made up,
    each by the table as it is by then.

    Args:
        prober: builds and times the networks.
        channels: of the network; groups that are not prunable stay whole.
        place: what is measured on.
        plan: how much to look.
        stage: told about every look.
    """
    plan, stage = plan or SamplingPlan(), stage or Stage("table", silent)
    widths = {group.name: group.width for group in channels.prunable}
    designs = [{}, *draw_widths(channels.groups, plan.measurements - 1, sampler.block, seed=plan.seed)]
    sampler.measure({}, seconds=min(0.5, plan.seconds))  # a processor that was idle is slow at first
    measurements, began = _Looks(sampler, context, plan), perf_counter()

    def table() -> LatencyTable:
        return LatencyTable.build(context, widths, sampler.block, measurements.taken())

    def look_at(line: Sequence[Mapping[str, int]]) -> None:
        for at in line:
            if measurements.count < plan.least or perf_counter() - began <= plan.most_seconds:
                ms = measurements.take(at)
                most = (plan.measurements + len(plan.target_shares)) * plan.rounds
                stage.step(min(measurements.count, most), most, ms=ms)

    look_at(designs * plan.rounds)
    look_at(measurements.slow())
    for number, share in enumerate(plan.target_shares):
        try:
            look_at([_planned(table(), channels, share, sampler.block, plan.seed + number)] * plan.rounds)
        except BudgetError:
            continue  # no widths are so fast
    return table()


class _Looks:
    """What was seen so far, and how fast the machine was meanwhile."""

    def __init__(self, sampler: LatencySampler, context: MeasurementContext, plan: SamplingPlan) -> None:
        self._sampler, self._context, self._plan, self.count = sampler, context, plan, 0
        self._dense = sampler.runner({}, "dense")
        self._paces = [self._pace_ms()]  # before the first look, and after each
        self._seen: dict[tuple[tuple[str, int], ...], NetworkTiming] = {}
        self._slowest: dict[tuple[tuple[str, int], ...], float] = {}  # paces around a network's least disturbed look

    def take(self, widths: Mapping[str, int]) -> float:
        """Look once; returns the milliseconds of a call."""
        look, key = self._sampler.measure(widths, seconds=self._plan.seconds), tuple(widths.items())
        self._paces.append(self._pace_ms())
        self._seen[key] = undisturbed(self._seen[key], look) if key in self._seen else look
        self._slowest[key] = min(self._slowest.get(key, inf), max(self._paces[-2:]))
        self.count += 1
        return look.total_ms

    def slow(self) -> list[Mapping[str, int]]:
        """Widths that were only seen while the machine was slow."""
        usual = float(np.quantile(self._paces, _USUAL))
        return [self._seen[key].widths for key, pace in self._slowest.items() if pace > _SLOW * usual]

    def taken(self) -> list[NetworkTiming]:
        """One for every network, the dense one first."""
        # Of the others the shortest of a few looks counts; on average that is this quantile of all that there are.
        whole = float(np.quantile(self._paces, 1 / (self._plan.rounds + 1)))
        return [replace(look, total_ms=whole) if not look.widths else look for look in self._seen.values()]

    def _pace_ms(self) -> float:
        seconds = min(_PACE_SECONDS, self._plan.seconds)
        with torch_threads(self._context.threads):
            return median_ms(self._dense.run, self._sampler.clock, seconds=seconds, fewest=_FEWEST_PACES)


def _planned(table: LatencyTable, channels: ChannelMap, share: float, block: int, seed: int) -> dict[str, int]:
    """Widths that a planner would take for scores like those of some trained network."""
    costs = replace(channels.costs, latency=LatencyCost(table, list(channels.costs.widths)))
    scores = {}
    for group in channels.prunable:
        draws = generator("aim", seed, group.name)
        level = torch.randn((), generator=draws).exp()  # layers matter more or less
        scores[group.name] = level * (0.5 + torch.rand(group.width, generator=draws))
    limit = int(NS_PER_MS * share * table.dense_ms)
    return allocate(scores, channels.groups, costs, limit, round_to=block).widths()


def draw_widths(groups: Sequence[ChannelGroup], count: int, block: int, *, seed: int) -> list[dict[str, int]]:
    """Widths of `count` networks from narrow to wide, every group's drawn around its network's share."""
    generator = np.random.default_rng(seed)
    designs = []
    for share in generator.permutation(np.linspace(0.15, 0.95, max(count, 1)))[:count]:
        widths = {}
        for group in groups:
            if group.is_prunable:
                candidates = candidate_widths(group, block, is_strict=True)
                wanted = np.clip(share + generator.uniform(-_SPREAD, _SPREAD), 0, 1) * group.width
                widths[group.name] = int(candidates[np.abs(candidates - wanted).argmin()])
        designs.append(widths)
    return designs
