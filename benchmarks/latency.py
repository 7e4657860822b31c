"""Latency: targets that are asked for and hit, tables that predict, and claims that hold.

    python -m benchmarks.latency targets --networks resnet18,mobilenet_v2 --batches 1,8 --threads 1
    python -m benchmarks.latency targets --backend compile --device cuda --precision fp16 --channels-last --cuda-graph
    python -m benchmarks.latency halving            uniform halving of all widths, against the inverse of the MACs ratio
    python -m benchmarks.latency peer               against torch-pruning at the same kept MACs
    python -m benchmarks.latency same               the same file as dense and as slim, 100 times; a little smaller one
                                                    as slim, 20 times; and back to back
    python -m benchmarks.latency table              how long a table takes, and how long from the cache
    python -m benchmarks.latency accuracy --cifar DIR --weights FILE       latency planning against MACs planning
    python -m benchmarks.latency show               the tables of all that was measured

Every row is written as soon as it is known to `results/latency.json`; what is there is not measured again. Networks
have random weights and take images of 224 pixels; ONNX Runtime on the CPU, but for targets where another backend is
asked for. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.fastest_widths import fastest_widths
from benchmarks.latency_accuracy import SUBJECTS, accuracy
from benchmarks.latency_report import NETWORKS, report
from benchmarks.latency_rows import MEASURE, Rows, against
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.widths import candidate_widths
from passdeploy.errors import PassDeployError
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.grouping.find import map_channels
from passdeploy.latency.cost import LatencyCost
from passdeploy.latency.hardware import MeasurementContext, block_of
from passdeploy.latency.network_timing import LatencySampler
from passdeploy.latency.resized_networks import sampler_for
from passdeploy.latency.sampling import SamplingPlan, sample_latency
from passdeploy.latency.search import LatencyGoal, LatencySearch
from passdeploy.latency.table import LatencyTable
from passdeploy.profiling.clock import HostClock, clock_for
from passdeploy.profiling.cuda import stream_of
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.interleaved import BUILT_ONCE, SESSIONS, TimeBudget
from passdeploy.profiling.runners import OrtRunner, Runner
from passdeploy.sparsity.baselines import magnitude_scores
from passdeploy.tracing.counts import count

RESULTS = Path(__file__).parent / "results" / "latency.json"
SHARES = (0.75, 0.5, 0.35)
IMAGE = (3, 224, 224)
# Multiples of torch-pruning's widths; and what each of our groups keeps at least: nothing in particular, or half of it.
PEER = ((None, 0.0), (8, 0.0), (8, 0.35))
LITTLE_LESS = 0.03  # of the multiply-adds, to see whether such a difference is found


@dataclass
class Unit:
    """A network at one batch size, on so many threads."""

    network: str
    batch: int
    threads: int
    backend: str = "ort"
    setting: Setting = field(default_factory=Setting)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = getattr(torchvision.models, self.network)(weights=None).eval()
        self.channels: ChannelMap = map_channels(self.model, torch.zeros(1, *IMAGE))
        self.images: Tensor = torch.randn(self.batch, *IMAGE, generator=torch.Generator().manual_seed(0))
        self.place = MeasurementContext.here(
            backend=self.backend, threads=self.threads, batch=self.batch, image_shape=IMAGE, setting=self.setting
        )
        self.device = self.setting.device_of(self.backend)
        self.macs = self.channels.costs.of("macs")

    @property
    def key(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "batch": self.batch,
            "threads": self.threads,
            "on": on(self.backend, self.setting),
        }

    def sampler(self) -> LatencySampler:
        return sampler_for(
            self.backend, self.model, self.channels, self.images, threads=self.threads, setting=self.setting
        )

    def table(self, sampler: LatencySampler, folder: Path) -> tuple[LatencyTable, float]:
        """The table, and the seconds that it took; kept in `folder` for the other parts."""
        kind = "" if self.backend == "ort" else "-" + on(self.backend, self.setting).replace(", ", "-").replace(":", "")
        path = folder / f"{self.network}-{self.batch}-{self.threads}{kind}.json"
        if path.is_file():
            return LatencyTable.load(path), float("nan")
        began = perf_counter()
        table = sample_latency(sampler, self.channels, self.place, SamplingPlan(most_seconds=180.0))
        table.save(path)
        return table, perf_counter() - began

    def uniform(self, share: float) -> dict[str, int]:
        """The same share of every group, aligned."""
        widths = {}
        for group in self.channels.prunable:
            rungs = candidate_widths(group, block_of("ort"), is_strict=True)
            widths[group.name] = int(rungs[abs(rungs - share * group.width).argmin()])
        return widths


def targets(asked: argparse.Namespace, rows: Rows) -> None:
    """Ask for three latencies, and measure what came of it once more."""
    setting = Setting(asked.device, asked.precision, asked.channels_last, asked.cuda_graph)
    for unit in units(asked, rows, "target", len(SHARES), backend=asked.backend, setting=setting):
        with stream_of(unit.device):
            _meet(unit, asked, rows)


def _meet(unit: Unit, asked: argparse.Namespace, rows: Rows) -> None:
    began = perf_counter()
    sampler = unit.sampler()
    table, seconds = unit.table(sampler, asked.tables)
    meeting = LatencySearch(
        sampler, unit.channels, table, round_to=block_of(unit.backend, unit.setting), threads=unit.threads,
        seconds=3.0, device=unit.device,
    )  # fmt: skip
    scores = magnitude_scores(unit.model, unit.channels.groups, norm="l2")
    dense = partial(sampler.runner, {}, "dense")
    sessions = 1 if unit.backend in BUILT_ONCE else SESSIONS
    for share in SHARES:
        row = {"part": "target", **unit.key, "asked": share, "table_error": table.error, "table_seconds": seconds}
        try:
            met = meeting.find(scores, LatencyGoal(share=share))
        except PassDeployError as error:
            rows.add({**row, "refused": str(error)})
            continue
        widths = met.trial.plan.widths()
        found = against(dense, partial(sampler.runner, widths, "slim"), clock=clock_for(unit.device), sessions=sessions)
        first = met.trials[0]
        rows.add({
            **row, **found, "found": 1 / found["speedup"], "trials": len(met.trials),
            "predicted": first.predicted, "first_found": first.found,
            "macs": unit.channels.costs.of("macs", widths) / unit.macs, "widths": widths,
            "seconds": round(perf_counter() - began, 1),
        })  # fmt: skip


def on(backend: str, setting: Setting) -> str:
    """A backend and how it is run, in words."""
    device = () if setting.device == "cpu" else (setting.device,)
    precision = () if setting.precision == "fp32" else (setting.precision,)
    return ", ".join((backend, *device, *precision, *setting.options))


def halving(asked: argparse.Namespace, rows: Rows) -> None:
    """Every width halved: how much of what the MACs promise arrives."""
    for unit in units(asked, rows, "halving", 1):
        sampler, widths = unit.sampler(), unit.uniform(0.5)
        found = against(partial(sampler.runner, {}, "dense"), partial(sampler.runner, widths, "slim"))
        ideal = unit.macs / unit.channels.costs.of("macs", widths)
        rows.add({"part": "halving", **unit.key, **found, "ideal": ideal})


def peer(asked: argparse.Namespace, rows: Rows) -> None:
    """The fastest widths by the table against what torch-pruning makes of the network, at the same kept MACs: half."""
    for unit in units(asked, rows, "peer", len(PEER)):
        sampler = unit.sampler()
        table, _ = unit.table(sampler, asked.tables)
        costs = replace(unit.channels.costs, latency=LatencyCost(table, list(unit.channels.costs.widths)))
        for round_to, least in PEER:
            pruned = _torch_pruning(unit, 0.5, round_to)
            macs = count(pruned, torch.zeros(1, *IMAGE)).macs
            widths = fastest_widths(costs, unit.channels.prunable, macs, round_to=block_of("ort"), least=least)
            with TemporaryDirectory() as folder:
                path = Path(folder) / "peer.onnx"
                export_onnx(pruned, unit.images[:1], path, batch=(unit.batch,) * 3)
                found = against(partial(_opened, path, unit), partial(sampler.runner, widths, "ours"))
            rows.add({
                "part": "peer", **unit.key, "asked": round_to or 1, "least": least,
                "our_macs": costs.of("macs", widths) / unit.macs, "their_macs": macs / unit.macs,
                "their_ms": found["dense_ms"], "our_ms": found["slim_ms"],
                "speedup": found["speedup"], "speedup_ci": found["speedup_ci"],
                "our_predicted_ms": table.predict_ms(widths), "widths": widths,
            })  # fmt: skip


def _opened(path: Path, unit: Unit) -> Runner:
    runner = OrtRunner("theirs", path, threads=unit.threads)
    runner.prepare(unit.images)
    return runner


def _torch_pruning(unit: Unit, macs: float, round_to: int | None) -> nn.Module:
    """torch-pruning's magnitude pruner at the ratio, found by bisection, that keeps `macs` of the multiply-adds."""
    import torch_pruning as tp

    example = torch.zeros(1, *IMAGE)
    low, high, best = 0.0, 0.95, (unit.model, 1.0)
    for _ in range(8):
        ratio = (low + high) / 2
        model = copy.deepcopy(unit.model)
        classifier = [
            module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1000
        ]
        pruner = tp.pruner.MagnitudePruner(
            model, example, tp.importance.MagnitudeImportance(p=2), pruning_ratio=ratio, round_to=round_to,
            ignored_layers=classifier,
        )  # fmt: skip
        pruner.step()
        kept = count(model, example).macs / unit.macs
        if abs(kept - macs) < abs(best[1] - macs):
            best = (model, kept)
        low, high = (ratio, high) if kept > macs else (low, ratio)
    return best[0]


def same(asked: argparse.Namespace, rows: Rows) -> None:
    """The same graph twice; one that is a little smaller; and against a plain loop, one call after the other."""
    unit = Unit("mobilenet_v2", 1, 1)
    sampler = unit.sampler()
    narrow = unit.uniform(0.5)
    whole, second = partial(sampler.runner, narrow, "dense"), TimeBudget(seconds=1.0)
    for number in range(100):
        if rows.find(part="same", run=number) is None:
            rows.add({"part": "same", "run": number, **against(whole, partial(sampler.runner, narrow, "slim"), second)})
    costs = unit.channels.costs
    widths = _a_little_less(unit, narrow, LITTLE_LESS)
    for number in range(20):
        if rows.find(part="power", run=number) is None:
            found = against(whole, partial(sampler.runner, widths, "slim"))
            macs = costs.of("macs", widths) / costs.of("macs", narrow)
            rows.add({"part": "power", "run": number, "macs": macs, "seconds": MEASURE.seconds, **found})
    for number in range(10):
        if rows.find(part="back to back", run=number) is None:
            other = sampler.runner(narrow, "slim")
            before = _plain_loop(other, seconds=1.0)
            in_turns = against(whole, lambda other=other: other, TimeBudget(seconds=2.0), sessions=1)["slim_ms"]
            plain = (before + _plain_loop(other, seconds=1.0)) / 2  # the machine changes from second to second
            rows.add({"part": "back to back", "run": number, "in_turns_ms": in_turns, "plain_ms": plain})


def _a_little_less(unit: Unit, widths: dict[str, int], share: float) -> dict[str, int]:
    """Widths with about `share` fewer multiply-adds: the widest groups go a block narrower until they are gone."""
    costs, found = unit.channels.costs, dict(widths)
    limit = (1 - share) * costs.of("macs", widths)
    while costs.of("macs", found) > limit:
        widest = max(found, key=lambda name: found[name])
        found[widest] -= block_of("ort")
    return found


def _plain_loop(runner: Runner, *, seconds: float) -> float:
    """As onnxruntime_perf_test: call after call; the median."""
    clock, found = HostClock(), []
    for _ in range(20):
        runner.run()
    began = clock.now()
    while clock.now() - began < seconds:
        found.append(clock.time_ms(runner.run))
    return statistics.median(found)


def table(asked: argparse.Namespace, rows: Rows) -> None:
    """Make the table of ResNet-50 on two threads, and read it again."""
    for unit in units(asked, rows, "table", 1, networks=("resnet50",), batches=(1,), threads=(2,)):
        with TemporaryDirectory() as folder:
            sampler = unit.sampler()
            made, seconds = unit.table(sampler, Path(folder))
            began = perf_counter()
            again, _ = unit.table(sampler, Path(folder))
            again.predict_ms({})
            read = perf_counter() - began
        rows.add({"part": "table", **unit.key, "seconds": seconds, "from_cache_seconds": read, "error": made.error})


def units(
    asked: argparse.Namespace,
    rows: Rows,
    part: str,
    rows_each: int,
    *,
    networks: tuple[str, ...] = (),
    batches: tuple[int, ...] = (),
    threads: tuple[int, ...] = (),
    backend: str = "ort",
    setting: Setting | None = None,
) -> Iterator[Unit]:
    """Those asked for that do not have all their rows."""
    for cores in threads or asked.threads:
        for batch in batches or asked.batches:
            for network in networks or asked.networks:
                setting = setting or Setting()
                key = {"network": network, "batch": batch, "threads": cores, "on": on(backend, setting)}
                there = [row for row in rows.all if row["part"] == part and key.items() <= row.items()]
                if len(there) < rows_each:
                    for row in there:
                        rows.all.remove(row)  # an unfinished unit is measured whole
                    torch.set_num_threads(cores)
                    yield Unit(network, batch, cores, backend, setting)


_PARTS = {"targets": targets, "halving": halving, "peer": peer, "same": same, "table": table, "accuracy": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*_PARTS, "show"])
    parser.add_argument("--networks", type=_list_of(str), default=NETWORKS)
    parser.add_argument("--batches", type=_list_of(int), default=(1, 8))
    parser.add_argument("--threads", type=_list_of(int), default=(1, 2))
    parser.add_argument("--backend", choices=("ort", "torch", "compile"), default="ort", help="of the part targets")
    parser.add_argument("--device", default="cpu", help="of torch and compile")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of torch and compile")
    parser.add_argument("--channels-last", action="store_true", help="of torch and compile")
    parser.add_argument("--cuda-graph", action="store_true", help="of torch and compile, on a GPU")
    parser.add_argument("--seeds", type=_list_of(int), default=(0, 1, 2), help="of the part accuracy")
    parser.add_argument("--steps", type=int, default=1000, help="of fine-tuning, in the part accuracy")
    parser.add_argument("--plans", action="store_true", help="only plan and measure, in the part accuracy")
    parser.add_argument("--cifar", type=Path, help="folder with train/CLASS and test/CLASS, for the part accuracy")
    parser.add_argument("--weights", type=Path, help="of ResNet-20, trained on these images; others are kept beside it")
    parser.add_argument("--subjects", type=_list_of(str), default=tuple(SUBJECTS), help="of the part accuracy")
    parser.add_argument("--tables", type=Path, default=RESULTS.parent / "latency-tables", help="where tables are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    rows = Rows(asked.out)
    if asked.part in _PARTS:
        _PARTS[asked.part](asked, rows)
    print("\n".join(report(rows.all)))


def _list_of(kind: type) -> Any:
    return lambda text: tuple(kind(part) for part in text.split(","))


if __name__ == "__main__":
    main()
