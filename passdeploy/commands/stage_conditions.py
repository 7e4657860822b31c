"""Conditions that a stage of a run works under: determinism, and a word on a batch that does not fit the memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from passdeploy.commands.try_training import TRIAL_IMAGES
from passdeploy.recipe import Recipe
from passdeploy.runtime.determinism import deterministic_algorithms
from passdeploy.runtime.device_memory import memory_errors
from passdeploy.runtime.events import Listener, Stage


@contextmanager
def stage_conditions(
    name: str,
    progress: Stage,
    recipe: Recipe,
    *,
    image_shape: tuple[int, ...],
    network: nn.Module,
    device: torch.device,
    listener: Listener,
) -> Iterator[None]:
    """Make a stage deterministic if the recipe asks for it, and report a batch that does not fit the memory.

    Plans for a latency are measured without determinism, as the deployed network will run.

    Args:
        name: of the stage.
        progress: of the stage: with steps that were done, the batch did fit.
        recipe: of the run.
        image_shape: (3, height, width).
        network: that is trained.
        device: of the run.
        listener: receives warnings.
    """
    size = recipe.prune.batch_size if name == "learn" else None
    key, batch = ("data.batch_size", recipe.data.batch_size) if size is None else ("prune.batch_size", size)
    shape = " x ".join(map(str, image_shape))

    def what() -> str:
        after = f", after {progress.done} steps" if progress.done else ""
        return f"stage {name}{after}: a batch of {batch} images of {shape}"

    with (
        memory_errors(
            what,
            device,
            advice=f"Halve it: --set {key}={max(1, batch // 2)}",
            fitted=lambda: batch if progress.done else TRIAL_IMAGES,
        ),
        deterministic_algorithms(recipe.deterministic and name != "time", device, network=network, listener=listener),
    ):
        yield
