"""Networks of torchvision and timm through Torch-TensorRT for RTX, without a GPU: how many become one engine.

    make .venv-torch-trt/installed
    .venv-torch-trt/bin/python -m benchmarks.torch_trt

80 classifiers of torchvision and 40 networks of timm, in fp32 and fp16, with an open and with a fixed batch, and 20 of
them slim, with about half of the multiply-adds. Each is exported as `passdeploy export --torch-trt` does it and goes
through a dry run, which lowers and partitions it as a build does; the graph that comes out is run on the CPU and
compared with the network. Some are built, and must have the partition of their dry run. What is answered for the GPU is
in tests/torch_trt_without_gpu.py.

Results are kept in a JSON file after every step, and a second call measures what is missing.
"""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.torch_trt_networks import BUILT, SLIM, TIMM, slim_half
from benchmarks.torch_trt_report import markdown
from benchmarks.zoo import Entry, entries
from passdeploy.errors import first_line
from passdeploy.export.artifact import BatchRange
from passdeploy.export.quiet import quietly
from passdeploy.export.torch_trt import compile_settings, run_compiler
from passdeploy.export.torch_trt_casting import CastGraph, prepare_for_casting
from passdeploy.export.torch_trt_lowering import LoweredGraph, export_graph, functional_graph, largest_difference
from passdeploy.export.torch_trt_report import Census, engine_bytes, partition_report, require_precision
from passdeploy.export.trt_engine import EngineOptions
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.versions import package_versions
from tests.torch_trt_without_gpu import import_without_gpu

PRECISIONS = ("fp32", "fp16")
BATCHES = {"open": BatchRange(1, 2, 8), "fixed": BatchRange(2, 2, 2)}
RESULTS = Path(__file__).parent / "results" / "torch_trt.json"


@dataclass(frozen=True)
class Job:
    """One network, dense or slim, with an open or a fixed batch: dry runs, or builds."""

    entry: Entry
    batch: str
    is_slim: bool = False
    is_built: bool = False

    @property
    def key(self) -> str:
        """The name of the job in the results."""
        form = ("slim " if self.is_slim else "") + ("built" if self.is_built else f"{self.batch} batch")
        return f"{self.entry.key}, {form}"


def jobs() -> list[Job]:
    """List the jobs, those that take the least time first: mostly few layers, open batches before fixed ones."""
    found: list[tuple[float, Job]] = []
    for entry in (*entries("torchvision"), *(Entry("timm", name) for name in TIMM)):
        layers, parameters = _size(entry)
        seconds = layers / 10 + parameters / 5e6
        found += [(seconds, Job(entry, "open")), (1.6 * seconds, Job(entry, "fixed"))]
        if entry.key in BUILT:
            found.append((1.2 * seconds, Job(entry, "open", is_built=True)))
        if entry.key in SLIM:
            found.append((1.3 * seconds, Job(entry, "open", is_slim=True)))
        if entry.key in SLIM & BUILT:
            found.append((1.4 * seconds, Job(entry, "open", is_slim=True, is_built=True)))
    return [job for _, job in sorted(found, key=lambda item: item[0])]


def _size(entry: Entry) -> tuple[int, int]:
    """Count the layers and the parameters of a network, which has no values where it can be built without."""
    try:
        with torch.device("meta"):
            network = entry.construct()
    except Exception:  # some networks compute with weights while they are built
        network = entry.construct()
    layers = sum(not list(module.children()) for module in network.modules())
    return layers, sum(weight.numel() for weight in network.parameters())


def run(job: Job, torch_trt: Any) -> dict[str, Any]:
    """Carry a job out; an error of one precision is its result."""
    network, images = job.entry.build(), job.entry.inputs(BATCHES[job.batch].typical)[0]
    result: dict[str, Any] = {"parameters": sum(weight.numel() for weight in network.parameters())}
    if job.is_slim:
        network, result["macs"] = slim_half(network, images)
    sizes, image_shape = BATCHES[job.batch], tuple(images.shape[1:])
    began = perf_counter()
    try:
        with torch.no_grad(), quietly():
            graph = functional_graph(export_graph(network, image_shape, sizes))
            result["lowered_difference"] = largest_difference(LoweredGraph(graph), network, images)
    except Exception as error:  # whatever an exporter raises is the result
        return result | {"error": _error(error)}
    result["export_s"] = round(perf_counter() - began, 1)
    for precision in PRECISIONS if not job.is_built else ("fp16",):
        began = perf_counter()
        try:
            found = _compile(job, torch_trt, network, graph, images, precision)
        except Exception as error:  # whatever the converters and the builder raise is the result
            found = {"error": _error(error)}
        result[precision] = found | {"seconds": round(perf_counter() - began, 1)}
        gc.collect()
    return result


def _compile(
    job: Job, torch_trt: Any, network: nn.Module, graph: torch.fx.GraphModule, images: Tensor, precision: str
) -> dict[str, Any]:
    """Take a graph through Torch-TensorRT in a precision, to a dry run or to engines."""
    sizes, image_shape = BATCHES[job.batch], tuple(images.shape[1:])
    beyond: list[str] = []
    with torch.no_grad(), quietly():
        if precision == "fp32":
            module: nn.Module = LoweredGraph(graph)
        else:
            module = CastGraph(prepare_for_casting(graph), precision)
            beyond = sorted(module.kept)
        program = export_graph(module, image_shape, sizes)
    settings = compile_settings(EngineOptions(), "rtx")
    name = type(network).__name__
    dry = run_compiler(torch_trt, program, image_shape, sizes, settings | {"dryrun": True}, name)
    report, census = partition_report(dry), Census.of(dry)
    result: dict[str, Any] = {**report, "census": census.to_json(), "beyond_range": beyond}
    if not report["torch_parts"]:  # a part in PyTorch has its tensors on a GPU that is not there
        result["difference"] = largest_difference(dry, network, images)
    if job.is_built:
        built = run_compiler(torch_trt, program, image_shape, sizes, settings, name)
        result["engine_bytes"] = engine_bytes(built)
        result["is_as_dry_run"] = partition_report(built) == report
        require_precision(census, precision, result["engine_bytes"], "rtx", has_kept=bool(beyond))
    return result


def _error(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"[:300]


def _missing(chosen: list[Job], document: dict[str, Any], fresh: bool) -> Iterator[Job]:
    return (job for job in chosen if fresh or job.key not in document["jobs"])


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--only", "pattern", default="*", help="Jobs whose name matches, as in a shell.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, help="Where results are kept.")
@click.option("--fresh", is_flag=True, help="Measure again what the file has already.")
@click.option("--report-only", is_flag=True, help="Write the tables of what the file has.")
def main(pattern: str, out: Path, fresh: bool, report_only: bool) -> None:
    """Measure what has no result yet; the module docstring describes how."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    document: dict[str, Any] = {"jobs": {}}
    if out.exists():
        document = json.loads(out.read_text())
    everything = jobs()
    document["all_jobs"] = [job.key for job in everything]
    chosen = [job for job in everything if fnmatchcase(job.key, pattern)]
    if not report_only:
        torch_trt = import_without_gpu()
        document["versions"] = package_versions()
        for number, job in enumerate(_missing(chosen, document, fresh), start=1):
            # Where the process dies, this is what the file says of the job.
            document["jobs"][job.key] = {"error": "the process ended"}
            write_atomically(out, json.dumps(document, indent=1) + "\n")
            document["jobs"][job.key] = result = run(job, torch_trt)
            write_atomically(out, json.dumps(document, indent=1) + "\n")
            counts = {
                name: result[name].get("engines", result[name].get("error")) for name in PRECISIONS if name in result
            }
            click.echo(f"{number} {job.key}: {result.get('error', counts)}")
    write_atomically(out.with_suffix(".md"), markdown(document))


if __name__ == "__main__":
    main()
