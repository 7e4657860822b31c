"""Measurement of a network's latency table, and plans by it for several roundings of widths (`--sweep-round`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from passdeploy.channels.groups import ChannelMap
from passdeploy.commands.prepare import build_dense
from passdeploy.commands.published import with_published_input
from passdeploy.data.splits import load_data
from passdeploy.grouping.find import map_channels
from passdeploy.latency.find_table import find_table, open_sampler
from passdeploy.latency.measurement_context import MeasurementContext
from passdeploy.latency.search import LatencyGoal, LatencySearch
from passdeploy.latency.sweep import sweep_round
from passdeploy.latency.target import SECONDS_PER_PLAN
from passdeploy.models.build import build_model
from passdeploy.profiling import Setting
from passdeploy.profiling.inputs import example_images
from passdeploy.recipe import load_recipe
from passdeploy.runtime.device_memory import memory_errors
from passdeploy.runtime.events import Listener
from passdeploy.runtime.files import require_writable
from passdeploy.sparsity.baselines import magnitude_scores


@dataclass(frozen=True, eq=False)
class TableNetwork:
    """A dense network with its channel groups, to measure a latency table of."""

    dense: nn.Module
    channels: ChannelMap
    image_shape: tuple[int, ...]  # (channels, height, width)


def network_of_recipe(recipe_name: str, *, allow_code: bool = False) -> TableNetwork:
    """Build the network of a recipe, with the recipe's classes, image size and patterns of layers to cut."""
    recipe = load_recipe(recipe_name)
    data = load_data(with_published_input(recipe).data)
    dense = build_dense(recipe, data.num_classes, allow_code=allow_code).eval()
    shape = tuple(data.image_shape)
    prune = recipe.prune
    channels = map_channels(
        dense,
        torch.zeros(1, *shape),
        include=prune.include,
        exclude=prune.exclude,
        with_blocks=prune.blocks is not False,
    )
    return TableNetwork(dense, channels, shape)


def network_by_name(model: str, *, classes: int, image_size: int, allow_code: bool = False) -> TableNetwork:
    """Build a network by its name (`torchvision/resnet50`), for square RGB images of `image_size` pixels."""
    shape = (3, image_size, image_size)
    dense = build_model(model, num_classes=classes, allow_code=allow_code).eval()
    return TableNetwork(dense, map_channels(dense, torch.zeros(1, *shape), with_blocks=True), shape)


def measure_table(
    network: TableNetwork,
    *,
    backend: str,
    batch: int,
    threads: int,
    setting: Setting,
    path: Path | None,
    sweep: Sequence[int],
    share: float,
    fresh: bool,
    listener: Listener,
) -> dict[str, Any]:
    """Measure a network's latency table, or take it from the cache.

    Args:
        network: whose layers are timed.
        backend: that runs it.
        batch: images per call.
        threads: of the CPU.
        setting: device, precision and memory format.
        path: file to write the table to; None: it is kept in the cache only.
        sweep: multiples that widths are rounded to; for each, a plan is made by the table and measured.
        share: of the dense latency, as the goal of each plan of the sweep.
        fresh: measure the table even if it is in the cache.
        listener: receives progress events.

    Returns:
        The document that `passdeploy profile --table --json` prints.

    Raises:
        UsageError: no file can be written at `path`.
    """
    if path is not None:
        require_writable(path.parent)  # before the measurement, which takes minutes
    dense, channels, shape = network.dense, network.channels, network.image_shape
    context = MeasurementContext.here(backend=backend, threads=threads, batch=batch, image_shape=shape, setting=setting)
    images = example_images(batch, shape)
    began = perf_counter()
    device, sides = setting.device_of(backend), " x ".join(map(str, shape))
    with memory_errors(
        lambda: f"a latency table in {backend}: a batch of {batch} images of {sides}",
        device,
        advice=f"Try half of it: --batch {max(1, batch // 2)}; other programs use memory too.",
        fitted=lambda: None,
    ):
        table = find_table(context, dense, channels, images, fresh=fresh, listener=listener)
    document: dict[str, Any] = {
        "place": table.to_json()["place"],
        "dense_ms": table.dense_ms,
        "seconds": round(perf_counter() - began, 2),
        "error": {"median": table.error[0], "largest": table.error[1]},
        "layers": len({node.layer for node in table.nodes}),
        "networks": len(table.measurements),
    }
    if path is not None:
        table.save(path)
        document["path"] = str(path)
    if sweep:
        scores = magnitude_scores(dense, channels.groups, norm="l2")
        with open_sampler(context, dense, channels, images) as sampler:

            def search_at(round_to: int) -> LatencySearch:
                return LatencySearch(
                    sampler,
                    channels,
                    table,
                    round_to=round_to,
                    threads=threads,
                    seconds=SECONDS_PER_PLAN,
                    device=device,
                )

            document["sweep"] = sweep_round(sweep, search_at, scores, LatencyGoal(share=share))
    return document
