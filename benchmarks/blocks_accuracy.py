"""Benchmark of accuracy at equal latency: plans of blocks and widths against plans of widths alone.

    python -m benchmarks.blocks_accuracy --cifar FOLDER --weights FILE [--launch 0.4] [--shares 0.5] [--seeds 0,1,2]
    python -m benchmarks.blocks_accuracy --cifar FOLDER --weights FILE --backend ort --methods pass --shares 0.5,0.35
                                         [--network mobilenet_v2]

By default the latency is that of a made-up table, in which every layer costs a fixed launch besides its multiply-adds,
as on a GPU: `--launch` is the share of all launches in the dense network's latency. With `--backend ort` the table is
that of ONNX Runtime with one thread and single images, and plans are measured until one meets the target, so nothing
else should run on the machine. Networks are pruned by PASS and by Taylor scores, and fine-tuned. Rows that are in the
results are not made again.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.accuracy_networks import ACCURACY_NETWORKS, build_network, dense_weights, load_images
from benchmarks.accuracy_settings import AccuracySetting, train_
from benchmarks.launch_sampler import ROUND_TO, LaunchSampler
from passdeploy.channels.allocation import Budget
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan, Scores
from passdeploy.errors import BudgetError
from passdeploy.grouping.find import map_channels
from passdeploy.latency.knapsack import allocate
from passdeploy.latency.latency_cost import with_latency
from passdeploy.latency.measurement_context import MeasurementContext
from passdeploy.latency.network_timing import LatencySampler
from passdeploy.latency.resized_networks import make_sampler
from passdeploy.latency.sampling import SamplingPlan, sample_latency
from passdeploy.latency.search import LatencyGoal, LatencySearch
from passdeploy.latency.table import LatencyTable
from passdeploy.recipe import OptimizerSpec
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.seeds import seed_of
from passdeploy.runtime.versions import package_versions
from passdeploy.slimming.slim import slim
from passdeploy.sparsity.baselines import taylor_scores
from passdeploy.sparsity.learn import PassSettings, learn_masks
from passdeploy.training.batch_norm import recalibrate_batch_norm_
from passdeploy.training.evaluate import evaluate

RESULTS = Path(__file__).parent / "results" / "blocks_accuracy.json"
KINDS, METHODS = ("widths", "blocks"), ("taylor", "pass")
BACKENDS = ("made-up", "ort")


@dataclass(frozen=True)
class LatencyPlanner:
    """Plans for shares of the dense network's latency by a latency table, and by measuring where there is a machine."""

    sampler: LatencySampler
    table: LatencyTable
    is_measured: bool

    def plan(self, scores: Scores, channels: ChannelMap, share: float) -> tuple[Plan, float]:
        """Plan for `share` of the dense latency; returns the plan and the share that it was found to take."""
        if not self.is_measured:
            costs = channels.costs
            limit = Budget.of("latency", share, costs).limit
            plan = allocate(scores, channels.prunable, costs, limit, round_to=ROUND_TO)
            return plan, costs.of("latency", plan.widths()) / costs.of("latency")
        search = LatencySearch(self.sampler, channels, self.table, round_to=ROUND_TO, seconds=2.0)
        best = search.find(scores, LatencyGoal(share=share)).best
        return best.plan, 1 / best.speedup.ratio


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--cifar", type=click.Path(path_type=Path, exists=True), required=True, help="Images by class.")
@click.option("--weights", type=click.Path(path_type=Path, exists=True), required=True, help="Of the dense ResNet-20.")
@click.option("--network", type=click.Choice(list(ACCURACY_NETWORKS)), default="resnet20", show_default=True)
@click.option("--backend", type=click.Choice(BACKENDS), default=BACKENDS[0], show_default=True)
@click.option("--launch", default=0.4, show_default=True, help="Share of launches in the made-up dense latency.")
@click.option("--shares", default="0.5", show_default=True, help="Of the dense latency, separated by commas.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--kinds", default=",".join(KINDS), show_default=True, help="Of plans.")
@click.option("--steps", default=200, show_default=True, help="Of mask learning (PASS), and as many of fine-tuning.")
@click.option("--fade", default=10, show_default=True, help="Steps over which PASS fades a block.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    cifar: Path,
    weights: Path,
    network: str,
    backend: str,
    launch: float,
    shares: str,
    seeds: str,
    methods: str,
    kinds: str,
    steps: int,
    fade: int,
    out: Path,
) -> None:
    """Prune to each share with and without blocks, fine-tune and evaluate."""
    torch.set_num_threads(1)
    data = load_images(cifar, ACCURACY_NETWORKS[network])
    dense = build_network(ACCURACY_NETWORKS[network], dense_weights(network, data, weights))
    setting = AccuracySetting.of("home", dense, data)
    channels = map_channels(dense, torch.zeros(1, *data.image_shape), with_blocks=True)
    planner = _planner(backend, dense, channels, tuple(data.image_shape), launch)
    with_blocks = replace(channels, costs=with_latency(channels.costs, planner.table))
    rows = Rows(out)
    for share, seed, method, kind in product(
        map(float, shares.split(",")), map(int, seeds.split(",")), methods.split(","), kinds.split(",")
    ):
        key = {
            "network": network,
            "backend": backend,
            "launch": launch if backend == "made-up" else None,
            "share": share,
            "seed": seed,
            "method": method,
            "kind": kind,
            "steps": steps,
            "fade": fade if (method, kind) == ("pass", "blocks") else None,
        }
        if rows.find(key):
            continue
        costs = with_blocks.costs if kind == "blocks" else with_blocks.costs.without_blocks()
        try:
            own = replace(setting, channels=replace(with_blocks, costs=costs))
            row = pruned(own, planner, share, seed, method, steps, fade)
        except BudgetError as error:
            row = {"refused": str(error).splitlines()[0]}
        rows.add({**key, "dense_top1": setting.top1, **row})


def _planner(
    backend: str, dense: nn.Module, channels: ChannelMap, image_shape: tuple[int, ...], launch: float
) -> LatencyPlanner:
    """Measure the table of a backend, or of the made-up machine."""
    image = torch.randn(1, *image_shape, generator=torch.Generator().manual_seed(0))
    context = MeasurementContext.here(backend="ort", threads=1, batch=1, image_shape=image_shape)
    if backend == "made-up":
        made_up = LaunchSampler(dense, channels, image, launch)
        table = sample_latency(made_up, channels, context, SamplingPlan(repeats=1, seconds=0.01))
        return LatencyPlanner(made_up, table, is_measured=False)
    sampler = make_sampler(backend, dense, channels, image, threads=1)
    return LatencyPlanner(sampler, sample_latency(sampler, channels, context), is_measured=True)


def pruned(
    setting: AccuracySetting, planner: LatencyPlanner, share: float, seed: int, method: str, steps: int, fade: int
) -> dict[str, Any]:
    """Prune the network to a share of its latency, fine-tune and evaluate it."""
    channels, dense = setting.channels, setting.dense
    costs, source = channels.costs, dense
    if method == "taylor":
        batches = islice(setting.stream("learn", seed), 1024 // setting.batch)
        scores = taylor_scores(copy.deepcopy(dense), channels.prunable, batches, F.cross_entropy, blocks=costs.blocks)
    else:
        settings = PassSettings(
            steps=steps,
            fade_steps=fade,
            round_to=ROUND_TO,
            distill=0.5,
            seed=seed,
            weights_optimizer=OptimizerSpec(lr=0.01),
        )
        learned = learn_masks(
            copy.deepcopy(dense).to(memory_format=torch.channels_last),
            channels.prunable,
            lambda: setting.stream("learn", seed),
            F.cross_entropy,
            costs=costs,
            budget=Budget.of("latency", share, costs),
            settings=replace(settings, prompt_size=2),
        )
        scores, source = learned.scores, learned.weights or dense
    plan, found = planner.plan(scores, channels, share)
    smaller = slim(source.to(memory_format=torch.contiguous_format), channels.groups, plan, channels.blocks)
    recalibrate_batch_norm_(smaller, islice(setting.stream("recalibrate", seed), 20))
    extra = steps if method == "taylor" else 0  # the weights of PASS were trained while it chose
    train_(smaller, setting, steps + extra, seed_of("finetune", seed), teacher=setting.teacher)
    return {
        "top1": evaluate(smaller, setting.data.test, batch_size=256).top1,
        "found": found,
        "macs": costs.of("macs", plan.widths()) / costs.of("macs"),
        "skipped": list(plan.skipped),
    }


class Rows:
    """The rows that were made; each is written to disk at once, with a table of the means over seeds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []

    def find(self, key: Mapping[str, Any]) -> bool:
        """True if there is a row with these values."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self._rows)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, and write all of them."""
        self._rows.append(row)
        print(json.dumps(row), flush=True)
        write_atomically(self._path, json.dumps({"versions": package_versions(), "rows": self._rows}, indent=1) + "\n")
        write_atomically(self._path.with_suffix(".md"), "\n".join([*self._report(), ""]))

    def _report(self) -> list[str]:
        cells: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
        columns = "network", "backend", "launch", "share", "method", "steps", "kind", "fade"
        for row in self._rows:
            cells[tuple(row[column] for column in columns)].append(row)
        lines = [
            "# Blocks and widths against widths alone, at equal latency",
            "",
            "CIFAR-10 as JPEG; a made-up table in which every layer costs a launch, or ONNX Runtime with one thread "
            "and single images (`benchmarks.blocks_accuracy`).",
            "",
            "| network | latency of | asked | found | method | steps | plan of | fading | top-1, mean | seeds | MACs "
            "| blocks skipped |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for (network, backend, launch, share, method, steps, kind, fade), rows in sorted(
            cells.items(), key=lambda item: str(item[0])
        ):
            made = [row for row in rows if "top1" in row]
            top1 = f"{mean(row['top1'] for row in made):.2%}" if made else rows[0]["refused"]
            macs = f"{mean(row['macs'] for row in made):.1%}" if made else ""
            skipped = ", ".join(str(len(row["skipped"])) for row in made)
            fading = f"{fade} steps" if fade else ""
            machine = f"{launch:.0%} launches" if backend == "made-up" else backend
            took = f"{mean(row['found'] for row in made):.1%}" if made else ""
            asked = f"{network} | {machine} | {share:.0%} | {took} | {method} | {steps} | {kind} | {fading}"
            found = f"{asked} | {top1} | {len(rows)} | {macs} | {skipped}"
            lines.append(f"| {found} |")
        return lines


if __name__ == "__main__":
    main()
