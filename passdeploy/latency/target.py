"""Latency target of a recipe: find its table, derive its budget, and search for a plan that meets it."""

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
from passdeploy.latency.find_table import find_table, open_sampler
from passdeploy.latency.latency_cost import NS_PER_MS, with_latency
from passdeploy.latency.measurement_context import MeasurementContext
from passdeploy.latency.resized_networks import require_table_support
from passdeploy.latency.search import LatencyGoal, LatencySearch, MeasuredPlan, plan_by_table
from passdeploy.latency.structure import require_same_network
from passdeploy.latency.table import LatencyTable
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.inputs import example_images
from passdeploy.profiling.interleaved import RunnerBuilder
from passdeploy.runtime.events import Listener, Stage, silent

if TYPE_CHECKING:
    from passdeploy.recipe import PruneSpec
    from passdeploy.recipe.pruning import MeasureSpec

SECONDS_PER_PLAN = 3.0  # length of each measurement of a plan


@dataclass(frozen=True, eq=False)
class LatencyTarget:
    """Latency to meet, with all that is needed to plan for it."""

    goal: LatencyGoal
    context: MeasurementContext  # machine and settings that the milliseconds of the table are of
    table: LatencyTable
    channels: ChannelMap  # its cost model includes latency
    budget: Budget
    round_to: int
    is_here: bool  # the table was made on this machine, so plans can be measured

    @property
    def dense_ms(self) -> float:
        """Milliseconds of the dense network."""
        return self.table.dense_ms

    @property
    def conditions(self) -> dict[str, Any]:
        """Processor, backend, device and settings of the measurements, for a summary."""
        return {"processor": self.context.processor, **self._settings, "round_to": self.round_to}

    @property
    def _settings(self) -> dict[str, Any]:
        """Backend, device and settings of the measurements, as in the rows of a profile."""
        context = self.context
        return {
            "backend": context.backend,
            "device": context.device,
            "precision": context.precision,
            "options": list(context.setting.options),
            "batch": context.batch,
            "threads": context.threads,
        }

    def rows(self, timed: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Convert measured times to rows of a profile, dense and slim; none where nothing was measured."""
        if not timed["is_measured"]:
            return []
        return [
            {
                "model": "dense",
                **self._settings,
                "median_ms": timed["dense_ms"],
                "speedup": 1.0,
                "speedup_ci": [1.0, 1.0],
            },
            {
                "model": "slim",
                **self._settings,
                "median_ms": timed["slim_ms"],
                "speedup": timed["speedup"],
                "speedup_ci": timed["speedup_ci"],
            },
        ]


def prepare_target(
    prune: PruneSpec,
    dense: nn.Module,
    channels: ChannelMap,
    image_shape: tuple[int, ...],
    *,
    device: str = "auto",
    listener: Listener = silent,
) -> LatencyTarget:
    """Find or measure the table of a network and derive the budget from it; trains nothing.

    Args:
        prune: section of the recipe, with a latency target.
        dense: the network, with any weights.
        channels: its groups.
        image_shape: (3, height, width).
        device: that the run asked for, which `prune.measure.device: auto` stands for.
        listener: receives progress events of the table.

    Raises:
        UsageError: the target is not below the dense latency, nothing can be cut, or the table was made on another
            machine or with other settings.
        PlanError: the table is of another network.
    """
    measure = prune.measure
    loaded = None if measure.table is None else LatencyTable.load(Path(measure.table))
    if loaded is not None:
        measure = _with_settings_of(loaded.context, measure)
    setting = _setting_of(measure, loaded, device, listener)
    require_table_support(measure.backend, setting)
    context = MeasurementContext.here(
        backend=measure.backend, threads=measure.threads, batch=measure.batch, image_shape=image_shape, setting=setting
    )
    images = example_images(measure.batch, image_shape)
    is_here = True
    if loaded is None:
        table = find_table(context, dense, channels, images, listener=listener)
    else:
        table = loaded
        table.context.require(context, str(measure.table), force=measure.force)
        require_same_network(table, dense, channels, images[:1])
        is_here = not table.context.differences_of_machine(context)
        context = context if is_here else table.context  # all milliseconds are of that machine
    costs = with_latency(channels.costs, table)
    channels = replace(channels, costs=costs)
    goal = LatencyGoal(share=prune.target.latency, ms=prune.target.latency_ms)
    dense_ns = costs.of("latency")
    if goal.ms is not None and goal.ms >= table.dense_ms and not prune.takes_plan:
        raise UsageError(
            f"prune.target.latency_ms: asked for {goal.ms:g} ms, but the dense network takes "
            f"{table.dense_ms:.3g} ms ({context.description}).\n"
            "Ask for less, or do not prune."
        )
    limit = int(goal.ms * NS_PER_MS) if goal.ms is not None else int((goal.share or 1.0) * dense_ns)
    round_to = table.block if prune.round_to == "auto" else int(prune.round_to)
    return LatencyTarget(goal, context, table, channels, Budget("latency", limit), round_to, is_here)


def _with_settings_of(made: MeasurementContext, measure: MeasureSpec) -> MeasureSpec:
    """Return what a table was measured with, in place of a recipe's `measure` that asks for nothing but the table."""
    if measure.model_copy(update={"table": None, "force": False}) != type(measure)():
        return measure
    settings = ("backend", "batch", "threads", "precision", "channels_last", "cuda_graph")
    return measure.model_copy(update={name: getattr(made, name) for name in settings})


def _setting_of(measure: MeasureSpec, table: LatencyTable | None, device: str, listener: Listener) -> Setting:
    """Return the setting of a recipe's measurements; `auto` is the device of the table, without one that of the run."""
    setting = Setting(measure.device, measure.precision, measure.channels_last, measure.cuda_graph)
    if measure.device != "auto":
        return setting
    if table is not None:
        return replace(setting, device=table.context.device)
    wanted = "auto" if measure.backend == "ort" else device
    return replace(setting, device=wanted).resolved((measure.backend,), listener)


def meet_target(
    target: LatencyTarget,
    scores: Scores,
    dense: nn.Module,
    *,
    build_delivered: Callable[[Plan], RunnerBuilder] | None = None,
    allocation: str = "global",
    given: Plan | None = None,
    progress: Stage | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """Find the plan that keeps the most of `scores` within the latency; returns it with its measured times.

    Where the table was made on another machine nothing can be measured: the plan is made by the table alone. A plan
    that is `given` stays as it is, whatever its latency, which is measured.
    """
    if not target.is_here:
        plan = given or plan_by_table(
            scores,
            target.channels.prunable,
            target.channels.costs,
            target.budget.limit,
            round_to=target.round_to,
            allocation=allocation,
        )
        table_ms = target.table.predict_ms(plan.widths())
        predicted = target.goal.of(table_ms, table_ms / target.table.dense_ms)
        return plan, {"achieved": predicted, "predicted": predicted, "is_measured": False, "trials": 0}
    context = target.context
    images = example_images(context.batch, context.image_shape)
    with open_sampler(context, dense, target.channels, images) as sampler:
        search = LatencySearch(
            sampler,
            target.channels,
            target.table,
            round_to=target.round_to,
            threads=context.threads,
            build_delivered=build_delivered,
            allocation=allocation,
            seconds=SECONDS_PER_PLAN,
            device=context.setting.device_of(context.backend),
        )
        if given is not None:
            return given, {**describe_trial(search.measured(given, target.goal)), "trials": 1, "is_measured": True}
        result = search.find(scores, target.goal, progress)
    return result.best.plan, {**describe_trial(result.best), "trials": len(result.trials), "is_measured": True}


def describe_trial(trial: MeasuredPlan) -> dict[str, Any]:
    """Convert the measurement of a plan to plain values."""
    return {
        "achieved": trial.measured,
        "predicted": trial.predicted,
        "dense_ms": trial.dense_ms,
        "slim_ms": trial.slim_ms,
        "speedup": trial.speedup.ratio,
        "speedup_ci": [trial.speedup.low, trial.speedup.high],
    }
