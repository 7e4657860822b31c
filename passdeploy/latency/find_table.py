"""Find a network's latency table: in the cache, or measured now and cached."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from passdeploy.channels.groups import ChannelMap
from passdeploy.errors import CorruptArtifact
from passdeploy.latency.hardware import MeasurementContext
from passdeploy.latency.network_timing import LatencySampler
from passdeploy.latency.resized_networks import sampler_for
from passdeploy.latency.sampling import SamplingPlan, sample_latency
from passdeploy.latency.table import LatencyTable
from passdeploy.profiling.cuda import stream_of
from passdeploy.runtime.events import Listener, silent, stage


def cache_folder() -> Path:
    """Where tables are kept: $PASSDEPLOY_CACHE, else the user's cache."""
    own = os.environ.get("PASSDEPLOY_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "passdeploy"


def cached_table(path: Path) -> LatencyTable | None:
    """The table in `path`, if there is one that can be read."""
    try:
        return LatencyTable.load(path) if path.is_file() else None
    except CorruptArtifact:
        return None  # it is measured again, and written over


USUAL_SAMPLING = SamplingPlan()


def find_table(
    context: MeasurementContext,
    dense: nn.Module,
    channels: ChannelMap,
    images: Tensor,
    *,
    plan: SamplingPlan | None = None,
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
    path = cache_folder() / f"latency-{context.key(_structure(channels))}.json"
    table = None if fresh else cached_table(path)
    if table is not None:
        return table
    with stage("table", f"how long layers take: {context.words}", tell) as progress:
        with sampler_at(context, dense, channels, images) as sampler:
            table = sample_latency(sampler, channels, context, plan or USUAL_SAMPLING, progress)
        typical, largest = table.error
        progress.text = f"{table.dense_ms:.3g} ms dense; off by {typical:.1%} in the median, {largest:.1%} at most"
    table.save(path)
    return table


@contextmanager
def sampler_at(
    context: MeasurementContext, dense: nn.Module, channels: ChannelMap, images: Tensor
) -> Iterator[LatencySampler]:
    """What looks at a network as `context` says; on a GPU work is queued on a stream of its own meanwhile."""
    sampler = sampler_for(context.backend, dense, channels, images, threads=context.threads, setting=context.setting)
    with stream_of(context.setting.device_of(context.backend)):
        yield sampler


def _structure(channels: ChannelMap) -> str:
    """What makes two networks the same to a table: their groups, and every layer's place in the count of MACs."""
    digest = hashlib.sha256()
    for group in channels.groups:
        digest.update(f"{group.name} {group.width} {group.is_prunable} {group.layers}".encode())
    for part in (channels.costs.macs, channels.costs.params):
        for array in (part.unit, part.fixed, part.spans):
            digest.update(array.tobytes())
    return digest.hexdigest()
