"""Find a network's latency table: in the cache, or measured now and cached."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from passdeploy.channels.groups import ChannelMap
from passdeploy.errors import CorruptArtifact, percent
from passdeploy.latency.cache_folder import cache_folder
from passdeploy.latency.measurement_context import UNKNOWN_CPU, MeasurementContext
from passdeploy.latency.network_timing import LatencySampler
from passdeploy.latency.resized_networks import make_sampler
from passdeploy.latency.sampling import SamplingPlan, sample_latency
from passdeploy.latency.structure import hash_modules, hash_operators
from passdeploy.latency.table import LatencyTable
from passdeploy.profiling.cuda import side_stream
from passdeploy.runtime.events import Listener, Warned, silent, stage
from passdeploy.runtime.versions import package_versions


def cached_table(path: Path) -> LatencyTable | None:
    """Load the table in `path`, or return None where there is none that can be read."""
    try:
        return LatencyTable.load(path) if path.is_file() else None
    except (CorruptArtifact, OSError):
        return None  # it is measured again and overwritten


_RUN_MODULES = ("torch", "compile")  # the other backends run a graph
_EXPORTERS = ("torch", "onnx", "onnxscript")  # that write the graph
_GPU_METHOD = 2  # part of the key of tables of a GPU: those before had events on another stream than the work
DEFAULT_SAMPLING: SamplingPlan | None = None  # None: by the backend


def find_table(
    context: MeasurementContext,
    dense: nn.Module,
    channels: ChannelMap,
    images: Tensor,
    *,
    plan: SamplingPlan | None = None,
    fresh: bool = False,
    listener: Listener = silent,
) -> LatencyTable:
    """Load a network's table from the cache, or measure it now and cache it.

    Args:
        context: this machine, the backend and its settings.
        dense: the network.
        channels: its groups.
        images: the batch to time, shape (batch, 3, height, width).
        plan: number and length of the measurements.
        fresh: measure the table even if it is in the cache.
        listener: receives progress events.

    Raises:
        UsageError: nothing of the network can be cut, so that there is nothing to measure.
    """
    channels.require_prunable(type(dense).__name__)
    path = cache_folder() / f"latency-{_cache_key(context, dense, channels, images[:1])}.json"
    # A cache may be shared by machines, of which those with an unknown processor cannot be told apart.
    table = None if fresh or context.processor == UNKNOWN_CPU else cached_table(path)
    if table is not None:
        return table
    with stage("table", f"how long layers take: {context.description}", listener) as progress:
        with open_sampler(context, dense, channels, images) as sampler:
            table = sample_latency(sampler, channels, context, plan or DEFAULT_SAMPLING, progress)
        table = replace(table, modules=hash_modules(dense, images[:1]))
        typical, largest = table.error
        error = f"off by {percent(typical)} in the median, {percent(largest)} at most"
        progress.text = f"{table.dense_ms:.3g} ms dense; {error}"
    try:
        table.save(path)
    except OSError as error:  # what was measured serves this run all the same
        reason = f"{path.parent} cannot be written to ({error.strerror})"
        listener(Warned(f"the table is not kept for the next run: {reason}.\nName another folder: PASSDEPLOY_CACHE"))
    return table


@contextmanager
def open_sampler(
    context: MeasurementContext, dense: nn.Module, channels: ChannelMap, images: Tensor
) -> Iterator[LatencySampler]:
    """Make a sampler for a network; inside the context, work on a GPU is queued on a side stream."""
    with side_stream(context.setting.device_of(context.backend)):
        yield make_sampler(context.backend, dense, channels, images, threads=context.threads, setting=context.setting)


def _cache_key(context: MeasurementContext, dense: nn.Module, channels: ChannelMap, image: Tensor) -> str:
    """Hash all that a table depends on: the context, the method, the exporter of the graph, and the network."""
    method = () if context.device == "cpu" else (_GPU_METHOD,)
    exporter = [] if context.backend in _RUN_MODULES else [package_versions().get(name) for name in _EXPORTERS]
    return context.key(_hash_groups(channels), hash_operators(dense, image), *method, *exporter)


def _hash_groups(channels: ChannelMap) -> str:
    """Hash the groups, the blocks and the cost model, which say what may be cut."""
    digest = hashlib.sha256()
    for group in channels.groups:
        digest.update(f"{group.name} {group.width} {group.is_prunable} {group.layers}".encode())
    for block in channels.costs.blocks:
        digest.update(f"{block.name} {block.modules}".encode())
    for count in (channels.costs.macs, channels.costs.params):
        for array in (count.unit, count.fixed, count.spans):
            digest.update(array.tobytes())
    return digest.hexdigest()
