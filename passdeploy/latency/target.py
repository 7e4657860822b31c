"""A latency that a recipe asks for: its table, its budget, and the plan that is measured to meet it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from passdeploy.channels.allocation import Budget
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan, Scores
from passdeploy.errors import UsageError
from passdeploy.latency.cost import NS_PER_MS, LatencyCost
from passdeploy.latency.find_table import find_table, sampler_at
from passdeploy.latency.hardware import MeasurementContext, block_of
from passdeploy.latency.knapsack import allocate
from passdeploy.latency.resized_networks import require_table
from passdeploy.latency.search import LatencyGoal, LatencySearch, MeasuredPlan
from passdeploy.latency.table import LatencyTable
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.inputs import example_images
from passdeploy.profiling.interleaved import RunnerBuilder
from passdeploy.runtime.events import Listener, Stage, silent

if TYPE_CHECKING:
    from passdeploy.recipe import PruneSpec

SECONDS = 3.0  # of every measurement of a plan


@dataclass(frozen=True, eq=False)
class LatencyTarget:
    """What to meet, and all that is needed to plan for it."""

    request: LatencyGoal
    context: MeasurementContext
    table: LatencyTable
    channels: ChannelMap  # its cost model knows of latency
    budget: Budget
    round_to: int
    is_here: bool  # whether this machine is the one that the table is of, so that plans can be measured

    @property
    def dense_ms(self) -> float:
        """What the dense network takes."""
        return self.table.dense_ms

    @property
    def on(self) -> dict[str, Any]:
        """What it is measured on, for a summary."""
        context = self.context
        how = {"device": context.device, "precision": context.precision, "options": list(context.setting.options)}
        return {
            "backend": context.backend,
            **how,
            "batch": context.batch,
            "threads": context.threads,
            "round_to": self.round_to,
        }

    def rows(self, timed: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What was measured, as rows of a profile: the dense network's and the slim one's; none where nothing was."""
        if not timed["is_measured"]:
            return []
        context = self.context
        alike = {
            "backend": context.backend,
            "device": context.device,
            "precision": context.precision,
            "batch": context.batch,
        }
        return [
            {"model": "dense", **alike, "median_ms": timed["dense_ms"], "speedup": 1.0, "speedup_ci": [1.0, 1.0]},
            {
                "model": "slim", **alike, "median_ms": timed["slim_ms"], "speedup": timed["speedup"],
                "speedup_ci": timed["speedup_ci"],
            },
        ]  # fmt: skip


def prepare_target(
    prune: PruneSpec,
    dense: nn.Module,
    channels: ChannelMap,
    image_shape: tuple[int, ...],
    *,
    tell: Listener = silent,
) -> LatencyTarget:
    """Find or make the table of a network, and turn what is asked into a budget; trains nothing.

    Args:
        prune: the section of the recipe, with a target of latency.
        dense: the network, of any weights.
        channels: of it.
        image_shape: (3, height, width).
        tell: hears of the table's progress.

    Raises:
        UsageError: the target makes no sense for what the dense network takes, or the table is of another place.
        PlanError: the table is of another network.
    """
    measure = prune.measure
    setting = Setting(measure.device, measure.precision, measure.channels_last, measure.cuda_graph)
    require_table(measure.backend, setting)
    context = MeasurementContext.here(
        backend=measure.backend, threads=measure.threads, batch=measure.batch, image_shape=image_shape, setting=setting
    )
    is_here = True
    if measure.table is not None:
        table = LatencyTable.load(Path(measure.table))
        is_here = not table.context.differences(context)
        if not measure.force:
            table.context.require(context, measure.table)
    else:
        images = example_images(measure.batch, image_shape)
        table = find_table(context, dense, channels, images, tell=tell)
    costs = replace(channels.costs, latency=LatencyCost(table, list(channels.costs.widths)))
    channels = replace(channels, costs=costs)
    request = LatencyGoal(share=prune.target.latency, ms=prune.target.latency_ms)
    whole = costs.of("latency")
    if request.ms is not None and request.ms >= table.dense_ms:
        raise UsageError(
            f"prune.target.latency_ms: asked for {request.ms:g} ms, but the dense network takes "
            f"{table.dense_ms:.3g} ms ({context.words}).\n"
            "Ask for less, or do not prune."
        )
    limit = int(request.ms * NS_PER_MS) if request.ms is not None else int((request.share or 1.0) * whole)
    round_to = block_of(measure.backend, setting) if prune.round_to == "auto" else int(prune.round_to)
    return LatencyTarget(request, context, table, channels, Budget("latency", limit), round_to, is_here)


def meet_target(
    target: LatencyTarget,
    scores: Scores,
    dense: nn.Module,
    *,
    confirm: Callable[[Plan], RunnerBuilder] | None = None,
    allocation: str = "global",
    progress: Stage | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """The plan that keeps the most of `scores` in the time there is, and what was measured of it.

    Where the table is of another machine, nothing can be measured: the plan is the table's own.
    """
    measure = target.context
    if not target.is_here:
        limit = target.budget.limit
        groups = target.channels.prunable
        plan = allocate(scores, groups, target.channels.costs, limit, round_to=target.round_to)
        says = target.table.predict_ms(plan.widths())
        predicted = target.request.of(says, says / target.table.dense_ms)
        return plan, {"achieved": predicted, "predicted": predicted, "is_measured": False, "trials": 0}
    images = example_images(measure.batch, measure.image_shape)
    with sampler_at(measure, dense, target.channels, images) as sampler:
        search_at = LatencySearch(
            sampler, target.channels, target.table, round_to=target.round_to, threads=measure.threads, confirm=confirm,
            allocation=allocation, seconds=SECONDS, device=measure.setting.device_of(measure.backend),
        )  # fmt: skip
        met = search_at.find(scores, target.request, progress)
    return met.trial.plan, {**measured(met.trial), "trials": len(met.trials), "is_measured": True}


def measured(trial: MeasuredPlan) -> dict[str, Any]:
    """A trial in plain values."""
    return {
        "achieved": trial.found,
        "predicted": trial.predicted,
        "dense_ms": trial.dense_ms,
        "slim_ms": trial.slim_ms,
        "speedup": trial.gained.ratio,
        "speedup_ci": [trial.gained.low, trial.gained.high],
    }
