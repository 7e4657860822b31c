"""Benchmark of accuracy at equal latency: plans of blocks and widths against plans of widths alone.

    python -m benchmarks.blocks_accuracy --cifar FOLDER --weights FILE [--launch 0.4] [--shares 0.5] [--seeds 0,1,2]

The latency is that of a made-up table, in which every layer costs a fixed launch besides its multiply-adds, as on a
GPU: `--launch` is the share of all launches in the dense network's latency. ResNet-20 is pruned to a share of it by
PASS and by Taylor scores, and fine-tuned; rows that are in the results are not made again.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy_settings import BATCH, AccuracySetting, train_
from passdeploy.channels.allocation import Budget
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.data.splits import load_data
from passdeploy.errors import BudgetError
from passdeploy.grouping.find import map_channels
from passdeploy.latency.knapsack import allocate
from passdeploy.latency.latency_cost import with_latency
from passdeploy.latency.measurement_context import MeasurementContext
from passdeploy.latency.network_timing import NetworkTiming
from passdeploy.latency.resized_networks import SlimNetworks
from passdeploy.latency.sampling import SamplingPlan, sample_latency
from passdeploy.models.build import build_model
from passdeploy.profiling.clock import HostClock
from passdeploy.profiling.kernel_times import NodeTime
from passdeploy.profiling.runners import TorchRunner
from passdeploy.recipe import DataSpec, OptimizerSpec
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
ROUND_TO = 8


class LaunchSampler:
    """Latency sampler that measures nothing: a layer takes a launch, and time in proportion to its multiply-adds.

    Args:
        model: the dense network.
        channels: its groups and blocks.
        images: that it takes.
        launch: share of all launches in the dense network's latency, which is 1 ms.
    """

    backend, block = "made-up", ROUND_TO

    def __init__(self, model: nn.Module, channels: ChannelMap, images: Tensor, launch: float) -> None:
        self.clock, self._networks, self._images = HostClock(), SlimNetworks(model, channels), images
        self._launch_ms, self._macs_ms = 0.0, 0.0
        layers = self._layers({})
        self._launch_ms = launch / len(layers)
        self._macs_ms = (1 - launch) / sum(macs for *_, macs in layers)

    def measure(self, widths: Mapping[str, int], *, seconds: float) -> NetworkTiming:
        """Return the times of the network at `widths`."""
        nodes = tuple(
            NodeTime(f"{name}/{kind}.0", kind, shapes, 2, self._launch_ms + self._macs_ms * macs)
            for name, kind, shapes, macs in self._layers(widths)
        )
        return NetworkTiming(dict(widths), sum(node.ms for node in nodes), nodes)

    def runner(self, widths: Mapping[str, int], name: str) -> TorchRunner:
        """Load the network; only the baseline times of the machine are taken with it, which change no table."""
        runner = TorchRunner(name, self._networks.at(widths))
        runner.prepare(self._images)
        return runner

    def _layers(self, widths: Mapping[str, int]) -> list[tuple[str, str, tuple[tuple[int, ...], ...], int]]:
        """List (name, kind, shapes of input, weight and output, multiply-adds) of the layers with a weight."""
        network, found = self._networks.at(widths), list[tuple[str, str, tuple[tuple[int, ...], ...], int]]()

        def record(name: str, layer: nn.Conv2d | nn.Linear, given: tuple[Tensor, ...], output: Tensor) -> None:
            macs = layer.weight[0].numel() * output.numel()
            shapes = tuple(given[0].shape), tuple(layer.weight.shape), tuple(output.shape)
            found.append((name, type(layer).__name__, shapes, macs))

        for name, module in network.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(lambda layer, given, out, name=name: record(name, layer, given, out))
        with torch.no_grad():
            network.eval()(self._images)
        return found


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--cifar", type=click.Path(path_type=Path, exists=True), required=True, help="Images by class.")
@click.option("--weights", type=click.Path(path_type=Path, exists=True), required=True, help="Of the dense ResNet-20.")
@click.option("--launch", default=0.4, show_default=True, help="Share of launches in the dense latency.")
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
    data = load_data(DataSpec(name="imagefolder", root=str(cifar), image_size=32, batch_size=BATCH))
    dense = build_model("passdeploy/resnet20_cifar", num_classes=10, weights=str(weights))
    setting = AccuracySetting.of("home", dense, data)
    image = torch.zeros(1, *data.image_shape)
    channels = map_channels(dense, image, with_blocks=True)
    context = MeasurementContext.here(backend="ort", threads=1, batch=1, image_shape=tuple(data.image_shape))
    table = sample_latency(
        LaunchSampler(dense, channels, image, launch), channels, context, SamplingPlan(repeats=1, seconds=0.01)
    )
    with_blocks = replace(channels, costs=with_latency(channels.costs, table))
    rows = Rows(out)
    for share, seed, method, kind in product(
        map(float, shares.split(",")), map(int, seeds.split(",")), methods.split(","), kinds.split(",")
    ):
        key = {"launch": launch, "share": share, "seed": seed, "method": method, "kind": kind, "steps": steps}
        if method == "pass" and fade != PassSettings.fade_steps:
            key["fade"] = fade
        if rows.find(key):
            continue
        costs = with_blocks.costs if kind == "blocks" else with_blocks.costs.without_blocks()
        try:
            row = pruned(replace(setting, channels=replace(with_blocks, costs=costs)), share, seed, method, steps, fade)
        except BudgetError as error:
            row = {"refused": str(error).splitlines()[0]}
        rows.add({**key, "dense_top1": setting.top1, **row})


def pruned(setting: AccuracySetting, share: float, seed: int, method: str, steps: int, fade: int) -> dict[str, Any]:
    """Prune the network to a share of its latency, fine-tune and evaluate it."""
    channels, dense = setting.channels, setting.dense
    limit, costs = int(share * channels.costs.of("latency")), channels.costs
    source = dense
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
            budget=Budget("latency", limit),
            settings=replace(settings, prompt_size=2),
        )
        scores, source = learned.scores, learned.weights or dense
    plan = allocate(scores, channels.prunable, costs, limit, round_to=ROUND_TO)
    smaller = slim(source.to(memory_format=torch.contiguous_format), channels.groups, plan, channels.blocks)
    recalibrate_batch_norm_(smaller, islice(setting.stream("recalibrate", seed), 20))
    extra = steps if method == "taylor" else 0  # the weights of PASS were trained while it chose
    train_(smaller, setting, steps + extra, seed_of("finetune", seed), teacher=setting.teacher)
    return {"top1": evaluate(smaller, setting.data.test, batch_size=256).top1, **_described(channels, plan)}


def _described(channels: ChannelMap, plan: Plan) -> dict[str, Any]:
    costs, widths = channels.costs, plan.widths()
    shares = {kind: costs.of(kind, widths) / costs.of(kind) for kind in ("latency", "macs")}
    return {"found": shares["latency"], "macs": shares["macs"], "skipped": list(plan.skipped)}


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
        for row in self._rows:
            fade = row.get("fade", PassSettings.fade_steps) if (row["method"], row["kind"]) == ("pass", "blocks") else 0
            cells[row["launch"], row["share"], row["method"], row["steps"], row["kind"], fade].append(row)
        lines = [
            "# Blocks and widths against widths alone, at equal latency",
            "",
            "ResNet-20, CIFAR-10 as JPEG; a made-up table in which every layer costs a launch "
            "(`benchmarks.blocks_accuracy`).",
            "",
            "| launches | asked | method | steps | plan of | fading | top-1, mean | seeds | MACs | blocks skipped |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for (launch, share, method, steps, kind, fade), rows in sorted(cells.items(), key=lambda item: str(item[0])):
            made = [row for row in rows if "top1" in row]
            top1 = f"{mean(row['top1'] for row in made):.2%}" if made else rows[0]["refused"]
            macs = f"{mean(row['macs'] for row in made):.1%}" if made else ""
            skipped = ", ".join(str(len(row["skipped"])) for row in made)
            fading = f"{fade} steps" if fade else ""
            asked = f"{launch:.0%} | {share:.0%} | {method} | {steps} | {kind} | {fading}"
            found = f"{asked} | {top1} | {len(rows)} | {macs} | {skipped}"
            lines.append(f"| {found} |")
        return lines


if __name__ == "__main__":
    main()
