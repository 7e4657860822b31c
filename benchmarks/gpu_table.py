"""Why a latency table of a GPU is off: tables under a few variants, each against networks that it has not seen.

    python -m benchmarks.gpu_table --out table.json          under 3 minutes
    python -m benchmarks.gpu_table --only nchw,nhwc

The case is ResNet-18 at 128 pixels, batch 128, fp16, eager with a CUDA graph, whose table was off by 22 % in the
median (`as-it-was`: the events of its clock were on another stream than the work). Every variant says

- how far two windows of one network are apart (the noise that no table can predict: other programs, clocks),
- how the whole call compares with the sum of the traced operators (a spread says that the graph runs other kernels),
- how far the table is off for random widths and for plans, and which operators it is off for.

`compile` is ResNet-50 at 224 pixels, batch 32, whose table took 198 s.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torchvision

from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.errors import BudgetError, first_line
from passdeploy.grouping.find import map_channels
from passdeploy.latency.knapsack import allocate
from passdeploy.latency.latency_cost import NS_PER_MS, with_latency
from passdeploy.latency.measurement_context import MeasurementContext, block_of
from passdeploy.latency.network_timing import LatencySampler, NetworkTiming, median_ms
from passdeploy.latency.resized_networks import SlimNetworks
from passdeploy.latency.sampling import SamplingPlan, draw_widths, sample_latency
from passdeploy.latency.table import LatencyTable
from passdeploy.latency.torch_sampler import TorchSampler
from passdeploy.profiling.clock import CudaClock
from passdeploy.profiling.cuda import side_stream
from passdeploy.profiling.environment import read_environment
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.inputs import example_images
from passdeploy.runtime.files import write_atomically

_WINDOWS = 5  # of one network, to see the noise
_RANDOM, _PLAN_SHARES = 6, (0.75, 0.5, 0.6, 0.4)  # networks that are held out


@dataclass(frozen=True)
class Variant:
    """A network, and how it is run and sampled."""

    network: str
    image: int
    batch: int
    backend: str
    channels_last: bool
    block: int | None = None  # widths are multiples of this; None: as `round_to: auto`
    is_astray: bool = False  # events are recorded on another stream than the work's, as they were
    is_searched: bool = False  # cuDNN times its kernels instead of choosing by rules
    held_out: int = _RANDOM
    sampling: SamplingPlan | None = None


_QUICK = SamplingPlan(networks=14, fewest_networks=9, repeats=1, seconds=0.5, most_seconds=25.0)
VARIANTS: Mapping[str, Variant] = {
    "nchw": Variant("resnet18", 128, 128, "torch", channels_last=False, sampling=_QUICK),
    "as-it-was": Variant("resnet18", 128, 128, "torch", channels_last=False, is_astray=True, sampling=_QUICK),
    "nhwc": Variant("resnet18", 128, 128, "torch", channels_last=True, sampling=_QUICK),
    "compile": Variant("resnet50", 224, 32, "compile", channels_last=True, held_out=2),
    "nchw-searched": Variant("resnet18", 128, 128, "torch", channels_last=False, is_searched=True, sampling=_QUICK),
    "nchw-64": Variant("resnet18", 128, 128, "torch", channels_last=False, block=64, sampling=_QUICK),
}


def study(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the table of a variant and networks that it has not seen."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, variant.network)(weights=None).eval()
    image, batch = options.image or variant.image, options.batch or variant.batch
    channels = map_channels(model, torch.zeros(1, 3, image, image))
    setting = Setting(
        options.device,
        "fp32" if options.device == "cpu" else "fp16",
        variant.channels_last,
        cuda_graph=options.device != "cpu",
    )
    sampler = TorchSampler(
        SlimNetworks(model, channels).at,
        example_images(batch, (3, image, image)),
        threads=1,
        block=variant.block or block_of(variant.backend, setting),
        backend=variant.backend,
        setting=setting,
    )
    if variant.is_astray and options.device != "cpu":
        sampler.clock = _ClockAstray(torch.device(options.device))
    context = MeasurementContext.here(
        backend=variant.backend, threads=1, batch=batch, image_shape=(3, image, image), setting=setting
    )
    sampling = variant.sampling or SamplingPlan.of(variant.backend)
    if options.table_seconds is not None:
        sampling = replace(sampling, most_seconds=options.table_seconds)
    with side_stream(setting.device_of(variant.backend)), _cudnn_search(variant.is_searched):
        noise = measure_noise(sampler)
        began = perf_counter()
        table = sample_latency(sampler, channels, context, sampling)
        seconds = perf_counter() - began
        held_out = list(_measure_held_out(sampler, channels, table, variant))
    by_kind = {
        kind: [timing for name, timing in held_out if name == kind] for kind in dict.fromkeys(k for k, _ in held_out)
    }
    return {
        "seconds": round(seconds, 1),
        "networks": len(table.measurements) - len(table.estimated),
        "dense_ms": table.dense_ms,
        "noise": noise,
        "own_error": table.error,
        "error": {kind: _errors(table, timings) for kind, timings in by_kind.items()},
        "call_over_trace": [timing.total_ms / sum(node.ms for node in timing.nodes) for _, timing in held_out],
        "operators": operator_errors(table, [timing for _, timing in held_out]),
    }


def measure_noise(sampler: LatencySampler) -> dict[str, float]:
    """Time the dense network in windows, loaded twice; return how far they are apart, relative to the fastest."""
    windows = []
    for _ in range(2):
        runner = sampler.runner({}, "dense")
        windows.append([median_ms(runner.run, sampler.clock, seconds=0.3) for _ in range(_WINDOWS)])
    fastest = [min(load) for load in windows]
    return {
        "windows": max(max(load) / low - 1 for load, low in zip(windows, fastest, strict=True)),
        "loads": max(fastest) / min(fastest) - 1,
    }


def _measure_held_out(
    sampler: LatencySampler, channels: ChannelMap, table: LatencyTable, variant: Variant
) -> Iterator[tuple[str, NetworkTiming]]:
    """Measure networks of random widths and of plans for random scores, none of which the table was fitted to."""
    for widths in draw_widths(channels, variant.held_out, sampler.block, seed=99):
        yield "random", sampler.measure(widths, seconds=0.5)
    costs = with_latency(channels.costs, table)
    generator = torch.Generator().manual_seed(99)
    for share in _PLAN_SHARES[: variant.held_out]:
        scores = {group.name: torch.rand(group.width, generator=generator) for group in channels.prunable}
        limit = int(NS_PER_MS * share * table.dense_ms)
        try:
            plan: Plan = allocate(scores, channels.prunable, costs, limit, round_to=sampler.block)
        except BudgetError:
            continue  # no widths are so fast
        yield "plans", sampler.measure(plan.widths(), seconds=0.5)


def _errors(table: LatencyTable, timings: list[NetworkTiming]) -> dict[str, Any]:
    """Return the relative errors of the table's predictions, their median and the largest."""
    signed = [table.predict_ms(timing.widths) / timing.total_ms - 1 for timing in timings]
    return {
        "median": float(np.median(np.abs(signed))),
        "largest": float(np.abs(signed).max()),
        "all": [round(error, 4) for error in signed],
    }


def operator_errors(table: LatencyTable, timings: list[NetworkTiming]) -> dict[str, dict[str, float]]:
    """Compare the predicted time of every kind of operator with its share of the measured calls.

    Returns:
        Kind -> `share` of the time, `error` (mean of |predicted - measured| over the operators of that kind, relative
        to their time) and `bias` (the same with the sign).
    """
    measured, wrong, signed = (
        defaultdict[str, float](float),
        defaultdict[str, float](float),
        defaultdict[str, float](float),
    )
    for timing in timings:
        scale = timing.total_ms / sum(node.ms for node in timing.nodes)
        predicted = dict(zip((node.name for node in table.nodes), table.node_ms(timing.widths), strict=True))
        for node in timing.nodes:
            if node.name in predicted:
                off = float(predicted[node.name]) - scale * node.ms
                measured[node.kind] += scale * node.ms
                wrong[node.kind] += abs(off)
                signed[node.kind] += off
    total = sum(measured.values())
    return {
        kind: {"share": ms / total, "error": wrong[kind] / ms, "bias": signed[kind] / ms}
        for kind, ms in sorted(measured.items(), key=lambda item: -item[1])
    }


class _ClockAstray(CudaClock):
    """Clock whose events are recorded on the default stream, whatever stream the work is queued on."""

    @property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.default_stream(self._device)

    def delay_device(self, ms: float) -> None:
        with torch.cuda.stream(self._stream):
            super().delay_device(ms)


@contextmanager
def _cudnn_search(is_on: bool) -> Iterator[None]:
    """Let cuDNN time its kernels inside the block, if asked."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = is_on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def describe(name: str, found: Mapping[str, Any]) -> str:
    """Write the result of a variant in a few lines."""
    ratios = np.array(found["call_over_trace"])
    lines = [
        f"{name}: {found['networks']} networks, {found['seconds']:.0f} s, dense {found['dense_ms']:.3g} ms",
        f"  windows of one load differ by {found['noise']['windows']:.1%}, loads by {found['noise']['loads']:.1%}; "
        f"call / traced operators {ratios.mean():.2f}, from {ratios.min():.2f} to {ratios.max():.2f}",
        f"  cross-validated: off by {found['own_error'][0]:.1%} in the median, {found['own_error'][1]:.1%} at most",
        *(
            f"  {kind}, not seen: off by {error['median']:.1%} in the median, {error['largest']:.1%} at most "
            f"({', '.join(f'{value:+.1%}' for value in error['all'])})"
            for kind, error in found["error"].items()
        ),
        *(
            f"  {kind}: {error['share']:.0%} of the time, off by {error['error']:.0%} each, {error['bias']:+.1%} in sum"
            for kind, error in list(found["operators"].items())[:4]
        ),
    ]
    return "\n".join(lines)


def run(options: argparse.Namespace, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Study the variants that fit into the time; the document is written after each."""
    document: dict[str, Any] = {"environment": read_environment(threads=1), "variants": {}, "left_out": []}
    began, longest = perf_counter(), 0.0
    for name in options.only or VARIANTS:
        left = options.seconds - (perf_counter() - began)
        if left < longest:
            document["left_out"].append(name)
            say(f"{name}: left out, no time left")
            continue
        variant_began = perf_counter()
        try:
            document["variants"][name] = found = study(VARIANTS[name], options)
            say(describe(name, found))
        except Exception as error:  # the next variant may do better; drivers raise errors of many types
            document["variants"][name] = {"failed": f"{type(error).__name__}: {first_line(error, longest=None)}"}
            say(f"{name}: {document['variants'][name]['failed']}")
        if VARIANTS[name].backend != "compile":
            longest = max(longest, perf_counter() - variant_began)
        if options.out is not None:
            write_atomically(options.out, json.dumps(document, indent=1) + "\n")
    return document


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: tuple(text.split(",")), help=f"of: {'; '.join(VARIANTS)}")
    parser.add_argument("--seconds", type=float, default=170.0, help="no variant is begun that would not fit into this")
    parser.add_argument("--device", default="cuda", help="cpu tries this program without a GPU, in fp32")
    parser.add_argument("--image", type=int, help="another image size")
    parser.add_argument("--batch", type=int, help="another batch size")
    parser.add_argument("--table-seconds", type=float, help="of the measurements of a table, at most")
    parser.add_argument("--out", type=Path, help="JSON file")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
