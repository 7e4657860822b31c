"""Latency targets on a GPU: table, plan and measurement for each network, batch and backend.

    python -m benchmarks.gpu_targets --seconds 540 --out targets.json
    python -m benchmarks.gpu_targets --backends tensorrt --networks resnet50 --batches 8

Networks are torchvision's with random weights, at 224 pixels in fp16; scores are L1 norms, since accuracy is not the
point. Backends that are not installed are skipped with the reason. A cell (network, batch, backend) measures a table
and searches a plan for each latency that is asked for; the plan is then measured once more, and that is the row. Cells
are done in the order of their use to a reader, and those that do not fit into the time are named. The file is written
after every row.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torchvision
from torch import nn

from passdeploy.channels.groups import ChannelMap
from passdeploy.errors import BudgetError, MissingError, first_line
from passdeploy.grouping.find import map_channels
from passdeploy.latency.measurement_context import MeasurementContext, block_of
from passdeploy.latency.resized_networks import make_sampler
from passdeploy.latency.sampling import SamplingPlan, sample_latency
from passdeploy.latency.search import LATENCY_TOLERANCE, LatencyGoal, LatencySearch
from passdeploy.profiling.cuda import side_stream
from passdeploy.profiling.environment import read_environment
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.inputs import example_images
from passdeploy.runtime.files import write_atomically
from passdeploy.sparsity.baselines import magnitude_scores

NETWORKS = ("resnet50", "mobilenet_v2", "efficientnet_b0")
BATCHES = (32, 8, 1)  # single images last: on a GPU they take as long as their launches, whatever their widths
BACKENDS = ("compile", "tensorrt", "ort-cuda")
SHARES = (0.75, 0.5)
_ON_CPU = ("ort", "torch", "compile")  # with --device cpu, to try this program


@dataclass(frozen=True)
class Cell:
    """A network at one batch size in one backend."""

    network: str
    batch: int
    backend: str

    def __str__(self) -> str:
        return f"{self.network}, batch {self.batch}, {self.backend}"


class Results:
    """Rows so far; every change is written to disk."""

    def __init__(self, path: Path | None) -> None:
        self._path, self.rows, self.left_out = path, list[dict[str, Any]](), list[str]()
        self._environment = read_environment(threads=1)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(_line_of(row), flush=True)
        self.write()

    def write(self) -> None:
        if self._path is not None:
            document = {"environment": self._environment, "rows": self.rows, "left_out": self.left_out}
            write_atomically(self._path, json.dumps(document, indent=1) + "\n")


@cache
def load(network: str, image: int) -> tuple[nn.Module, ChannelMap]:
    """Build a network with random weights, and find its groups."""
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, network)(weights=None).eval()
    return model, map_channels(model, torch.zeros(1, 3, image, image))


def setting_of(backend: str, options: argparse.Namespace) -> Setting:
    """Return how users would deploy on a backend: a CUDA graph and channels-last where there are such options."""
    if options.device == "cpu":
        return Setting()
    graph, layout = backend in ("compile", "tensorrt"), backend == "compile"
    return Setting(options.device, options.precision, channels_last=layout, cuda_graph=graph)


def measure_cell(cell: Cell, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the table of a cell, and yield a row for each share of the latency."""
    model, channels = load(cell.network, options.image)
    setting, shape = setting_of(cell.backend, options), (3, options.image, options.image)
    context = MeasurementContext.here(
        backend=cell.backend, threads=1, batch=cell.batch, image_shape=shape, setting=setting
    )
    plan = SamplingPlan.of(cell.backend)
    if options.table_seconds is not None:
        plan = replace(plan, most_seconds=options.table_seconds)
    key = {"network": cell.network, "batch": cell.batch, "backend": cell.backend, "precision": setting.precision}
    began = perf_counter()
    images = example_images(cell.batch, shape)
    with side_stream(setting.device_of(cell.backend)):
        sampler = make_sampler(cell.backend, model, channels, images, threads=1, setting=setting)
        table = sample_latency(sampler, channels, context, plan)
        facts = {
            **key,
            "table_seconds": round(perf_counter() - began, 1),
            "table_error": table.error,
            "table_networks": len(table.measurements) - len(table.estimated),
            "table_traced": len(table.estimated),
            "dense_ms": table.dense_ms,
        }
        search = LatencySearch(
            sampler,
            channels,
            table,
            round_to=block_of(cell.backend, setting),
            seconds=options.trial_seconds,
            device=setting.device_of(cell.backend),
        )
        scores = magnitude_scores(model, channels.groups, norm="l1")
        for share in options.shares:
            yield {**facts, "asked": share, **_search(search, scores, channels, share)}


def _search(
    search: LatencySearch, scores: dict[str, torch.Tensor], channels: ChannelMap, share: float
) -> dict[str, Any]:
    """Search the plan for a share of the latency and measure it once more."""
    began, goal = perf_counter(), LatencyGoal(share=share)
    try:
        result = search.find(scores, goal)
    except BudgetError as error:
        return {"refused": first_line(error, longest=None), "search_seconds": round(perf_counter() - began, 1)}
    seconds = round(perf_counter() - began, 1)
    again, widths = search.measure_plan(result.best.plan, goal), result.best.plan.widths()
    return {
        "found": again.measured,
        "found_ci": [1 / again.speedup.high, 1 / again.speedup.low],
        "slim_ms": again.slim_ms,
        "searched": result.best.measured,
        "predicted": result.trials[0].predicted,
        "trials": [trial.measured for trial in result.trials],
        "search_seconds": seconds,
        "macs": channels.costs.of("macs", widths) / channels.costs.of("macs"),
    }


def _line_of(row: dict[str, Any]) -> str:
    """Write a row as one line."""
    head = f"{row['network']:16s} batch {row['batch']:3d} {row['backend']:9s}"
    if "missing" in row or "failed" in row:
        return f"{head} {row.get('missing') or row['failed']}"
    median, largest = row["table_error"]
    table = f"table {row['table_seconds']:5.1f} s, off by {median:.1%} / {largest:.1%}, dense {row['dense_ms']:.3g} ms"
    if "refused" in row:
        return f"{head} {table}; asked {row['asked']:.2f}: refused: {row['refused']}"
    low, high = row["found_ci"]
    excess = row["found"] / row["asked"] - 1
    met = "met" if abs(excess) <= LATENCY_TOLERANCE else "missed"
    return (
        f"{head} {table}; asked {row['asked']:.2f}: {row['found']:.3f} ({low:.3f} to {high:.3f}), {excess:+.1%} {met}, "
        f"{len(row['trials'])} plans, {row['search_seconds']:.0f} s, {row['macs']:.0%} of the MACs"
    )


def run(options: argparse.Namespace) -> Results:
    """Measure all cells that fit into the time."""
    results, began = Results(options.out), perf_counter()
    took, missing = dict[str, float](), dict[str, str]()  # by backend: seconds of its last cell; why it is not here
    cells = [Cell(*cell) for cell in product(options.networks, options.batches, options.backends)]
    for cell in sorted(
        cells, key=lambda cell: (options.batches.index(cell.batch), options.networks.index(cell.network))
    ):
        left = options.seconds - (perf_counter() - began)
        if cell.backend in missing or left < took.get(cell.backend, 0.0) or left <= 0:
            results.left_out.append(f"{cell}: {missing.get(cell.backend, 'no time left')}")
            results.write()
            continue
        cell_began, key = perf_counter(), {"network": cell.network, "batch": cell.batch, "backend": cell.backend}
        try:
            for row in measure_cell(cell, options):
                results.add(row)
        except MissingError as error:
            missing[cell.backend] = first_line(error, longest=None)
            results.add({**key, "missing": missing[cell.backend]})
        except Exception as error:  # the next cell may do better; drivers and compilers raise errors of many types
            results.add({**key, "failed": f"{type(error).__name__}: {first_line(error, longest=None)}"})
        took[cell.backend] = perf_counter() - cell_began
        torch._dynamo.reset()  # frees the memory of compiled networks
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def summarise(results: Results) -> str:
    """Count the targets that were met, missed and refused."""
    rows = [row for row in results.rows if "asked" in row]
    found = [row for row in rows if "found" in row]
    met = sum(abs(row["found"] / row["asked"] - 1) <= LATENCY_TOLERANCE for row in found)
    lines = [f"{met} of {len(found)} plans within 3 % either way, measured again; {len(rows) - len(found)} refused."]
    return "\n".join([*lines, *(f"left out: {cell}" for cell in results.left_out)])


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=_names, default=NETWORKS)
    parser.add_argument("--batches", type=lambda text: tuple(map(int, text.split(","))), default=BATCHES)
    parser.add_argument("--backends", type=_names, default=None, help=f"default: {','.join(BACKENDS)}")
    parser.add_argument("--shares", type=lambda text: tuple(map(float, text.split(","))), default=SHARES)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--device", default="cuda", help="cpu tries this program without a GPU, in fp32")
    parser.add_argument("--image", type=int, default=224, help="size in pixels")
    parser.add_argument("--seconds", type=float, default=540.0, help="no cell is begun that would not fit into this")
    parser.add_argument("--table-seconds", type=float, default=None, help="of the measurements of a table, at most")
    parser.add_argument("--trial-seconds", type=float, default=2.0, help="of the measurement of a plan")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    options.backends = options.backends or (_ON_CPU if options.device == "cpu" else BACKENDS)
    print(summarise(run(options)))


if __name__ == "__main__":
    main()
