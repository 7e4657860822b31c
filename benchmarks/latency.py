"""Benchmarks of latency: accuracy of latency targets, tables and measured speed-ups.

    python -m benchmarks.latency targets --networks resnet18,mobilenet_v2 --batches 1,8 --threads 1
    python -m benchmarks.latency targets --backend compile --device cuda --precision fp16 --channels-last --cuda-graph
    python -m benchmarks.latency targets --blocks   whole blocks may be skipped too
    python -m benchmarks.latency reach              the fastest network of widths alone, and of widths and blocks; also
                                                    with --backend compile --device cuda ..., as targets
    python -m benchmarks.latency halving            uniform halving of all widths, against the inverse of the MACs ratio
    python -m benchmarks.latency peer               against torch-pruning at the same kept MACs
    python -m benchmarks.latency same               the same file as dense and as slim, 100 times; a little smaller one
                                                    as slim, 20 times; and back to back
    python -m benchmarks.latency table              how long a table takes, and how long from the cache
    python -m benchmarks.latency accuracy --cifar DIR --weights FILE       latency planning against MACs planning
    python -m benchmarks.latency show               the tables of all that was measured

Every row is written at once to `results/latency.json`; rows that are there are not measured again. Networks have random
weights and take images of 224 pixels. They run in ONNX Runtime on the CPU, except targets and reach of another
`--backend`. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.accuracy_networks import ACCURACY_NETWORKS
from benchmarks.fastest_widths import fastest_widths
from benchmarks.latency_accuracy import accuracy
from benchmarks.latency_report import NETWORKS, report
from benchmarks.latency_rows import MEASURE, Rows, measure_pair
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Scores
from passdeploy.channels.widths import candidate_widths
from passdeploy.errors import PassDeployError
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.grouping.find import map_channels
from passdeploy.latency.knapsack import allocate_fastest
from passdeploy.latency.latency_cost import with_latency
from passdeploy.latency.measurement_context import MeasurementContext, block_of
from passdeploy.latency.network_timing import LatencySampler
from passdeploy.latency.resized_networks import make_sampler
from passdeploy.latency.sampling import SamplingPlan, sample_latency
from passdeploy.latency.search import LatencyGoal, LatencySearch
from passdeploy.latency.table import LatencyTable
from passdeploy.profiling.clock import HostClock, clock_for
from passdeploy.profiling.cuda import side_stream
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.interleaved import BUILT_ONCE, SESSIONS, TimeBudget
from passdeploy.profiling.runners import OrtRunner, Runner
from passdeploy.sparsity.baselines import magnitude_scores, with_block_sums
from passdeploy.tracing.counts import count

RESULTS = Path(__file__).parent / "results" / "latency.json"
SHARES = (0.75, 0.5, 0.35)
IMAGE = (3, 224, 224)
# Multiples that torch-pruning rounds widths to, and the share of its channels that each of our groups keeps at least.
TORCH_PRUNING_WIDTHS = ((None, 0.0), (8, 0.0), (8, 0.35))
SMALL_DIFFERENCE = 0.03  # of the multiply-adds, to test whether such a difference is measured


@dataclass
class BenchmarkCase:
    """A network at one batch size and number of threads, in one backend."""

    network: str
    batch: int
    threads: int
    backend: str = "ort"
    setting: Setting = field(default_factory=Setting)
    blocks: bool = False  # whether they may be skipped

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = getattr(torchvision.models, self.network)(weights=None).eval()
        self.channels: ChannelMap = map_channels(self.model, torch.zeros(1, *IMAGE), with_blocks=self.blocks)
        self.images: Tensor = torch.randn(self.batch, *IMAGE, generator=torch.Generator().manual_seed(0))
        self.context = MeasurementContext.here(
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
            "on": backend_label(self.backend, self.setting, blocks=self.blocks),
        }

    def sampler(self) -> LatencySampler:
        return make_sampler(
            self.backend, self.model, self.channels, self.images, threads=self.threads, setting=self.setting
        )

    def table(
        self, sampler: LatencySampler, folder: Path, plan: SamplingPlan | None = None
    ) -> tuple[LatencyTable, float]:
        """Read the latency table from `folder`, or measure it (by `plan`) and write it there.

        Returns:
            The table, and the seconds that it took; nan if it was read.
        """
        label = backend_label(self.backend, self.setting, blocks=self.blocks).replace(", ", "-").replace(":", "")
        suffix = "" if label == "ort" else f"-{label}"
        path = folder / f"{self.network}-{self.batch}-{self.threads}{suffix}.json"
        if path.is_file():
            return LatencyTable.load(path), float("nan")
        began = perf_counter()
        table = sample_latency(sampler, self.channels, self.context, plan or SamplingPlan(most_seconds=180.0))
        table.save(path)
        return table, perf_counter() - began

    def measure(self, sampler: LatencySampler, widths: dict[str, int]) -> dict[str, Any]:
        """Measure the network of `widths` in turns with the dense one; what is compiled is built once."""
        return measure_pair(
            partial(sampler.runner, {}, "dense"),
            partial(sampler.runner, widths, "slim"),
            clock=clock_for(self.device),
            sessions=1 if self.backend in BUILT_ONCE else SESSIONS,
        )

    def scores(self) -> Scores:
        """Score channels and blocks by the norm of their weights."""
        scores = magnitude_scores(self.model, self.channels.groups, norm="l2")
        return with_block_sums(scores, self.channels.costs.blocks)

    def uniform(self, share: float) -> dict[str, int]:
        """Return widths with the same share of every group, rounded to the block size of ONNX Runtime."""
        widths = {}
        for group in self.channels.prunable:
            candidates = candidate_widths(group, block_of("ort"), is_strict=True)
            widths[group.name] = int(candidates[abs(candidates - share * group.width).argmin()])
        return widths


def targets(options: argparse.Namespace, rows: Rows) -> None:
    """Plan for three latencies, and measure the resulting networks again."""
    cases = pending_cases(
        options,
        rows,
        "target",
        len(SHARES),
        backend=options.backend,
        setting=_setting_of(options),
        blocks=options.blocks,
    )
    for case in cases:
        with side_stream(case.device):
            _measure_targets(case, options, rows)


def _measure_targets(case: BenchmarkCase, options: argparse.Namespace, rows: Rows) -> None:
    began = perf_counter()
    sampler = case.sampler()
    table, seconds = case.table(sampler, options.tables)
    search = LatencySearch(
        sampler,
        case.channels,
        table,
        round_to=block_of(case.backend, case.setting),
        threads=case.threads,
        seconds=3.0,
        device=case.device,
    )
    scores = case.scores()
    for share in SHARES:
        row = {
            "part": "target",
            **case.key,
            "asked": share,
            "table_error": table.error,
            "table_seconds": seconds,
        }
        try:
            result = search.find(scores, LatencyGoal(share=share))
        except PassDeployError as error:
            rows.add({**row, "refused": str(error)})
            continue
        widths = result.best.plan.widths()
        times = case.measure(sampler, widths)
        first = result.trials[0]
        rows.add(
            {
                **row,
                **times,
                "found": 1 / times["speedup"],
                "trials": len(result.trials),
                "predicted": first.predicted,
                "first_found": first.measured,
                "macs": case.channels.costs.of("macs", widths) / case.macs,
                "widths": widths,
                "seconds": round(perf_counter() - began, 1),
            }
        )


def reach(options: argparse.Namespace, rows: Rows) -> None:
    """Measure the fastest network by the latency table, of widths alone, and of widths and blocks."""
    backend, setting = options.backend, _setting_of(options)
    for case in pending_cases(options, rows, "reach", 1, backend=backend, setting=setting, blocks=True):
        with side_stream(case.device):
            rows.add({"part": "reach", **case.key, **_measure_reach(case, options)})


def _measure_reach(case: BenchmarkCase, options: argparse.Namespace) -> dict[str, Any]:
    sampler, round_to = case.sampler(), block_of(case.backend, case.setting)
    table, _ = case.table(sampler, options.tables, SamplingPlan(repeats=1, most_seconds=60.0))
    costs, measured = with_latency(case.channels.costs, table), dict[str, Any]()
    for kind, by in (("widths alone", costs.without_blocks()), ("widths and blocks", costs)):
        plan = allocate_fastest(case.scores(), case.channels.groups, by, round_to=round_to)
        times = case.measure(sampler, plan.widths())
        measured[kind] = {
            "predicted": table.predict_ms(plan.widths()) / table.dense_ms,
            "found": 1 / times["speedup"],
            "skipped": len(plan.skipped),
            **times,
        }
    return measured


def _setting_of(options: argparse.Namespace) -> Setting:
    return Setting(options.device, options.precision, options.channels_last, options.cuda_graph)


def backend_label(backend: str, setting: Setting, *, blocks: bool = False) -> str:
    """Name a backend with its device, precision and options where they are not the defaults, and plans with blocks."""
    device = () if setting.device == "cpu" else (setting.device,)
    precision = () if setting.precision == "fp32" else (setting.precision,)
    return ", ".join((backend, *device, *precision, *setting.options, *(("blocks",) if blocks else ())))


def halving(options: argparse.Namespace, rows: Rows) -> None:
    """Halve every width and compare the speed-up with the ratio of the MACs."""
    for case in pending_cases(options, rows, "halving", 1):
        sampler, widths = case.sampler(), case.uniform(0.5)
        times = case.measure(sampler, widths)
        ideal = case.macs / case.channels.costs.of("macs", widths)
        rows.add({"part": "halving", **case.key, **times, "ideal": ideal})


def against_torch_pruning(options: argparse.Namespace, rows: Rows) -> None:
    """Compare the fastest widths by the latency table with torch-pruning's network, at the same kept MACs (half)."""
    for case in pending_cases(options, rows, "peer", len(TORCH_PRUNING_WIDTHS)):
        sampler = case.sampler()
        table, _ = case.table(sampler, options.tables)
        costs = with_latency(case.channels.costs, table)
        for round_to, least in TORCH_PRUNING_WIDTHS:
            pruned = _prune_by_torch_pruning(case, 0.5, round_to)
            macs = count(pruned, torch.zeros(1, *IMAGE)).macs
            widths = fastest_widths(costs, case.channels.prunable, macs, round_to=block_of("ort"), least=least)
            with TemporaryDirectory() as folder:
                path = Path(folder) / "peer.onnx"
                export_onnx(pruned, case.images[:1], path, batch=(case.batch,) * 3)
                times = measure_pair(partial(_open_runner, path, case), partial(sampler.runner, widths, "ours"))
            rows.add(
                {
                    "part": "peer",
                    **case.key,
                    "asked": round_to or 1,
                    "least": least,
                    "our_macs": costs.of("macs", widths) / case.macs,
                    "their_macs": macs / case.macs,
                    "their_ms": times["dense_ms"],
                    "our_ms": times["slim_ms"],
                    "speedup": times["speedup"],
                    "speedup_ci": times["speedup_ci"],
                    "our_predicted_ms": table.predict_ms(widths),
                    "widths": widths,
                }
            )


def _open_runner(path: Path, case: BenchmarkCase) -> Runner:
    runner = OrtRunner("theirs", path, threads=case.threads)
    runner.prepare(case.images)
    return runner


def _prune_by_torch_pruning(case: BenchmarkCase, macs: float, round_to: int | None) -> nn.Module:
    """Prune by magnitude with torch-pruning, at the ratio (found by bisection) that keeps the share `macs`."""
    import torch_pruning as tp

    example = torch.zeros(1, *IMAGE)
    low, high, best = 0.0, 0.95, (case.model, 1.0)
    for _ in range(8):
        ratio = (low + high) / 2
        model = copy.deepcopy(case.model)
        classifier = [
            module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1000
        ]
        pruner = tp.pruner.MagnitudePruner(
            model,
            example,
            tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            round_to=round_to,
            ignored_layers=classifier,
        )
        pruner.step()
        kept = count(model, example).macs / case.macs
        if abs(kept - macs) < abs(best[1] - macs):
            best = (model, kept)
        low, high = (ratio, high) if kept > macs else (low, ratio)
    return best[0]


def same_network(options: argparse.Namespace, rows: Rows) -> None:
    """Measure a graph against itself, against one that is a little smaller, and in a plain loop of calls."""
    case = BenchmarkCase("mobilenet_v2", 1, 1)
    sampler = case.sampler()
    narrow = case.uniform(0.5)
    whole, second = partial(sampler.runner, narrow, "dense"), TimeBudget(seconds=1.0)
    for number in range(100):
        if rows.find(part="same", run=number) is None:
            rows.add(
                {"part": "same", "run": number, **measure_pair(whole, partial(sampler.runner, narrow, "slim"), second)}
            )
    costs = case.channels.costs
    widths = _slightly_narrower(case, narrow, SMALL_DIFFERENCE)
    for number in range(20):
        if rows.find(part="power", run=number) is None:
            times = measure_pair(whole, partial(sampler.runner, widths, "slim"))
            macs = costs.of("macs", widths) / costs.of("macs", narrow)
            rows.add({"part": "power", "run": number, "macs": macs, "seconds": MEASURE.seconds, **times})
    for number in range(10):
        if rows.find(part="back to back", run=number) is None:
            other = sampler.runner(narrow, "slim")
            before = _plain_loop(other, seconds=1.0)
            in_turns = measure_pair(whole, lambda other=other: other, TimeBudget(seconds=2.0), sessions=1)["slim_ms"]
            plain = (
                before + _plain_loop(other, seconds=1.0)
            ) / 2  # both sides of the interleaved run, since the machine drifts
            rows.add({"part": "back to back", "run": number, "in_turns_ms": in_turns, "plain_ms": plain})


def _slightly_narrower(case: BenchmarkCase, widths: dict[str, int], share: float) -> dict[str, int]:
    """Remove about `share` of the multiply-adds: the widest group gets a block narrower until they are gone."""
    costs, narrower = case.channels.costs, dict(widths)
    limit = (1 - share) * costs.of("macs", widths)
    while costs.of("macs", narrower) > limit:
        widest = max(narrower, key=lambda name: narrower[name])
        narrower[widest] -= block_of("ort")
    return narrower


def _plain_loop(runner: Runner, *, seconds: float) -> float:
    """Run call after call, as onnxruntime_perf_test does, and return the median in milliseconds."""
    clock, times_ms = HostClock(), []
    for _ in range(20):
        runner.run()
    began = clock.now()
    while clock.now() - began < seconds:
        times_ms.append(clock.time_ms(runner.run))
    return statistics.median(times_ms)


def table(options: argparse.Namespace, rows: Rows) -> None:
    """Measure the table of ResNet-50 on two threads, and time how long it takes to read it again."""
    for case in pending_cases(options, rows, "table", 1, networks=("resnet50",), batches=(1,), threads=(2,)):
        with TemporaryDirectory() as folder:
            sampler = case.sampler()
            made, seconds = case.table(sampler, Path(folder))
            began = perf_counter()
            again, _ = case.table(sampler, Path(folder))
            again.predict_ms({})
            read = perf_counter() - began
        rows.add({"part": "table", **case.key, "seconds": seconds, "from_cache_seconds": read, "error": made.error})


def pending_cases(
    options: argparse.Namespace,
    rows: Rows,
    part: str,
    rows_each: int,
    *,
    networks: tuple[str, ...] = (),
    batches: tuple[int, ...] = (),
    threads: tuple[int, ...] = (),
    backend: str = "ort",
    setting: Setting | None = None,
    blocks: bool = False,
) -> Iterator[BenchmarkCase]:
    """Build the cases of a part that do not have all their rows; their rows are removed and measured again."""
    for cores in threads or options.threads:
        for batch in batches or options.batches:
            for network in networks or options.networks:
                setting = setting or Setting()
                label = backend_label(backend, setting, blocks=blocks)
                key = {"network": network, "batch": batch, "threads": cores, "on": label}
                known = [row for row in rows.all if row["part"] == part and key.items() <= row.items()]
                if len(known) < rows_each:
                    for row in known:
                        rows.all.remove(row)  # an unfinished case is measured from the start
                    torch.set_num_threads(cores)
                    yield BenchmarkCase(network, batch, cores, backend, setting, blocks)


_PARTS = {
    "targets": targets,
    "reach": reach,
    "halving": halving,
    "peer": against_torch_pruning,
    "same": same_network,
    "table": table,
    "accuracy": accuracy,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*_PARTS, "show"])
    parser.add_argument("--networks", type=_list_of(str), default=NETWORKS)
    parser.add_argument("--batches", type=_list_of(int), default=(1, 8))
    parser.add_argument("--threads", type=_list_of(int), default=(1, 2))
    parser.add_argument("--backend", choices=("ort", "torch", "compile"), default="ort", help="of targets and reach")
    parser.add_argument("--blocks", action="store_true", help="skip blocks too, in the part targets")
    parser.add_argument("--device", default="cpu", help="of torch and compile")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of torch and compile")
    parser.add_argument("--channels-last", action="store_true", help="of torch and compile")
    parser.add_argument("--cuda-graph", action="store_true", help="of torch and compile, on a GPU")
    parser.add_argument("--seeds", type=_list_of(int), default=(0, 1, 2), help="of the part accuracy")
    parser.add_argument("--steps", type=int, default=1000, help="of fine-tuning, in the part accuracy")
    parser.add_argument("--plans", action="store_true", help="only plan and measure, in the part accuracy")
    parser.add_argument("--cifar", type=Path, help="folder with train/CLASS and test/CLASS, for the part accuracy")
    parser.add_argument("--weights", type=Path, help="of ResNet-20, trained on these images; others are kept beside it")
    parser.add_argument("--subjects", type=_list_of(str), default=tuple(ACCURACY_NETWORKS), help="of the part accuracy")
    parser.add_argument("--tables", type=Path, default=RESULTS.parent / "latency-tables", help="where tables are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = Rows(options.out)
    if options.part in _PARTS:
        _PARTS[options.part](options, rows)
    print("\n".join(report(rows.all)))


def _list_of(kind: type) -> Any:
    return lambda text: tuple(kind(part) for part in text.split(","))


if __name__ == "__main__":
    main()
