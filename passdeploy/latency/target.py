"""A latency that a recipe asks for: its table, its budget, and the plan that is measured to meet it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelMap
from passdeploy.errors import BudgetError, UsageError
from passdeploy.events import Listener, Stage, silent, stage
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.latency.allocate import allocate
from passdeploy.latency.meeting import Meeting, Met, Request, Trial
from passdeploy.latency.networks import prober_for, require_table
from passdeploy.latency.observation import Prober
from passdeploy.latency.place import Place, block_of
from passdeploy.latency.price import NS_PER_MS, LatencyPrice
from passdeploy.latency.survey import Survey, cache_folder, cached_table, survey
from passdeploy.latency.table import LatencyTable
from passdeploy.plan import Budget, Plan, Scores
from passdeploy.profiling.measure import Build
from passdeploy.profiling.runners import Runner
from passdeploy.profiling.setting import Setting, stream_of
from passdeploy.profiling.subjects import Subject, runner_of
from passdeploy.slimming import slim
from passdeploy.sparsity.prompt import VisualPrompt, with_prompt

if TYPE_CHECKING:
    from passdeploy.recipe import PruneSpec


USUAL_SURVEY = Survey()
SECONDS = 3.0  # of every measurement of a plan


@dataclass(frozen=True, eq=False)
class LatencyTarget:
    """What to meet, and all that is needed to plan for it."""

    request: Request
    place: Place
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
        place = self.place
        how = {"device": place.device, "precision": place.precision, "options": list(place.setting.options)}
        return {
            "backend": place.backend, **how, "batch": place.batch, "threads": place.threads, "round_to": self.round_to,
        }  # fmt: skip

    def rows(self, timed: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What was measured, as rows of a profile: the dense network's and the slim one's; none where nothing was."""
        if not timed["is_measured"]:
            return []
        place = self.place
        alike = {
            "backend": place.backend, "device": place.device, "precision": place.precision, "batch": place.batch,
        }  # fmt: skip
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
    place = Place.here(
        backend=measure.backend, threads=measure.threads, batch=measure.batch, image_shape=image_shape, setting=setting
    )
    is_here = True
    if measure.table is not None:
        table = LatencyTable.load(Path(measure.table))
        is_here = not table.place.differences(place)
        if not measure.force:
            table.place.require(place, measure.table)
    else:
        images = example_images(measure.batch, image_shape)
        table = find_table(place, dense, channels, images, tell=tell)
    costs = replace(channels.costs, latency=LatencyPrice(table, list(channels.costs.widths)))
    channels = replace(channels, costs=costs)
    request = Request(share=prune.target.latency, ms=prune.target.latency_ms)
    whole = costs.of("latency")
    if request.ms is not None and request.ms >= table.dense_ms:
        raise UsageError(
            f"prune.target.latency_ms: asked for {request.ms:g} ms, but the dense network takes "
            f"{table.dense_ms:.3g} ms ({place.words}).\n"
            "Ask for less, or do not prune."
        )
    limit = int(request.ms * NS_PER_MS) if request.ms is not None else int((request.share or 1.0) * whole)
    round_to = block_of(measure.backend, setting) if prune.round_to == "auto" else int(prune.round_to)
    return LatencyTarget(request, place, table, channels, Budget("latency", limit), round_to, is_here)


def find_table(
    place: Place,
    dense: nn.Module,
    channels: ChannelMap,
    images: Tensor,
    *,
    plan: Survey | None = None,
    fresh: bool = False,
    tell: Listener = silent,
) -> LatencyTable:
    """The table of a network on this machine, from the cache or measured now.

    Args:
        place: here.
        dense: the network.
        channels: of it.
        images: the batch to time, shape (batch, 3, height, width).
        plan: how much to look, where it is measured.
        fresh: measure it even if it is in the cache.
        tell: hears of the progress.
    """
    path = cache_folder() / f"latency-{place.key(_structure(channels))}.json"
    table = None if fresh else cached_table(path)
    if table is not None:
        return table
    with stage("table", f"how long layers take: {place.words}", tell) as progress:
        with prober_at(place, dense, channels, images) as prober:
            table = survey(prober, channels, place, plan or USUAL_SURVEY, progress)
        typical, largest = table.error
        progress.text = f"{table.dense_ms:.3g} ms dense; off by {typical:.1%} in the median, {largest:.1%} at most"
    table.save(path)
    return table


@contextmanager
def prober_at(place: Place, dense: nn.Module, channels: ChannelMap, images: Tensor) -> Iterator[Prober]:
    """What looks at a network as `place` says; on a GPU work is queued on a stream of its own meanwhile."""
    prober = prober_for(place.backend, dense, channels, images, threads=place.threads, setting=place.setting)
    with stream_of(place.setting.device_of(place.backend)):
        yield prober


def meet_target(
    target: LatencyTarget,
    scores: Scores,
    dense: nn.Module,
    *,
    confirm: Callable[[Plan], Build] | None = None,
    allocation: str = "global",
    progress: Stage | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """The plan that keeps the most of `scores` in the time there is, and what was measured of it.

    Where the table is of another machine, nothing can be measured: the plan is the table's own.
    """
    measure = target.place
    if not target.is_here:
        limit = target.budget.limit
        groups = target.channels.prunable
        plan = allocate(scores, groups, target.channels.costs, limit, round_to=target.round_to)
        says = target.table.predict_ms(plan.widths())
        predicted = target.request.of(says, says / target.table.dense_ms)
        return plan, {"achieved": predicted, "predicted": predicted, "is_measured": False, "trials": 0}
    image_shape = tuple(int(size) for size in measure.image.split("x"))
    images = example_images(measure.batch, image_shape)
    with prober_at(measure, dense, target.channels, images) as prober:
        meeting = Meeting(
            prober, target.channels, target.table, round_to=target.round_to, threads=measure.threads, confirm=confirm,
            allocation=allocation, seconds=SECONDS, device=measure.setting.device_of(measure.backend),
        )  # fmt: skip
        met = meeting.meet(scores, target.request, progress)
    return met.trial.plan, {**measured(met.trial), "trials": len(met.trials), "is_measured": True}


@contextmanager
def as_used(
    place: Place, dense: nn.Module, channels: ChannelMap, prompt: VisualPrompt | None
) -> Iterator[Callable[[Plan], Build]]:
    """What makes the network of a plan as it will be delivered (cut with its weights, behind its prompt, exported).

    It returns what loads that network, ready to be timed.

    Files are gone when the context ends.
    """
    image_shape = tuple(int(size) for size in place.image.split("x"))
    images = example_images(place.batch, image_shape)
    with TemporaryDirectory() as folder:

        def make(plan: Plan) -> Build:
            network = with_prompt(slim(dense, channels.groups, plan), prompt).eval()
            path = Path(folder) / "slim.onnx"
            if place.backend == "ort":
                export_onnx(network, images[:1], path, batch=(place.batch,) * 3)
            subject = Subject("slim", module=network, onnx=path)

            def load() -> Runner:
                runner = runner_of(subject, place.backend, place.threads, place.setting)
                runner.prepare(images)
                return runner

            return load

        yield make


def measured(trial: Trial) -> dict[str, Any]:
    """A trial in plain values."""
    return {
        "achieved": trial.found,
        "predicted": trial.predicted,
        "dense_ms": trial.dense_ms,
        "slim_ms": trial.slim_ms,
        "speedup": trial.gained.ratio,
        "speedup_ci": [trial.gained.low, trial.gained.high],
    }


def sweep_round(
    steps: Sequence[int], meeting: Callable[[int], Meeting], scores: Scores, request: Request
) -> list[dict[str, Any]]:
    """Plan and measure the same request with widths in multiples of each of `steps`.

    Returns:
        One row per step: `round_to`, the share of the score that is `kept`, and what was measured; or why it was
        `refused`.
    """
    rows = []
    whole = sum(float(values.sum()) for values in scores.values())
    for step in steps:
        try:
            met: Met = meeting(step).meet(scores, request)
        except BudgetError as error:
            rows.append({"round_to": step, "refused": str(error).splitlines()[0]})
            continue
        kept = sum(float(scores[name][list(channels)].sum()) for name, channels in met.trial.plan.kept.items())
        rows.append({"round_to": step, "kept": kept / whole, **measured(met.trial)})
    return rows


def example_images(batch: int, image_shape: tuple[int, ...]) -> Tensor:
    """Noise to time with, the same every time, shape (batch, *image_shape)."""
    return torch.randn(batch, *image_shape, generator=torch.Generator().manual_seed(0))


def _structure(channels: ChannelMap) -> str:
    """What makes two networks the same to a table: their groups, and every layer's place in the count of MACs."""
    digest = hashlib.sha256()
    for group in channels.groups:
        digest.update(f"{group.name} {group.width} {group.is_prunable} {group.layers}".encode())
    for part in (channels.costs.macs, channels.costs.params):
        for array in (part.unit, part.fixed, part.spans):
            digest.update(array.tobytes())
    return digest.hexdigest()
