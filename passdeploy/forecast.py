"""How long a run will take on this machine, from a few steps that are timed and thrown away."""

from __future__ import annotations

import copy
from time import perf_counter
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from passdeploy.lessons import logits_of
from passdeploy.models import comes_trained
from passdeploy.optimizers import make_optimizer
from passdeploy.running import evaluating

if TYPE_CHECKING:
    from passdeploy.pipeline import Prepared

IMAGES = 8  # of a timed step; a whole batch of a large network would take too long
PATIENCE = 3.0  # seconds after which no further step is timed
_BACKWARD = 2.0  # a backward pass takes about as long as two forward passes


def forecast(prepared: Prepared, device: torch.device) -> dict[str, float]:
    """Stage -> seconds, about: `dense` (0 where it comes trained), `learn` and `finetune`.

    Fine-tuning is counted at the size of the dense network, so it will be faster. What a latency target measures is
    not counted.

    Args:
        prepared: the recipe and what it names.
        device: where the run will be.
    """
    recipe, data = prepared.recipe, prepared.data
    image = _seconds_per_image(prepared, device)
    taught, batch = 1 + 1 / (1 + _BACKWARD), min(recipe.data.batch_size, len(data.train))  # a teacher's forward pass
    epoch, test = image * len(data.train), image * len(data.test) / (1 + _BACKWARD)
    is_trained = comes_trained(
        recipe.model.name, num_classes=data.num_classes, weights=recipe.model.weights, new_head=recipe.model.new_head
    )
    learn = image * (recipe.prune.batch_size or batch) * (taught if recipe.prune.distill else 1)
    return {
        "dense": test + (0 if is_trained else recipe.train.epochs * epoch),
        "learn": recipe.prune.steps * learn if recipe.prune.method in ("pass", "growing") else 0.0,
        "finetune": 2 * test + recipe.finetune.epochs * epoch * (taught if recipe.finetune.distill else 1),
    }


def _seconds_per_image(prepared: Prepared, device: torch.device) -> float:
    """Of a step of dense training, loading the images included; the fastest of a few."""
    data, network = prepared.data, copy.deepcopy(prepared.dense).to(device)
    optimizer, times = make_optimizer(network, prepared.recipe.train.optimizer), list[float]()
    size, began = min(IMAGES, len(data.train)), perf_counter()
    with evaluating(network, training=True), torch.random.fork_rng():
        last = began
        for images, labels in data.train.batches(size, epoch=0, seed=0, augment=True, drop_last=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(logits_of(network(images.to(device))), labels.to(device))
            loss.backward()
            optimizer.step()
            loss.item()  # waits for the device
            times.append(perf_counter() - last)
            last = perf_counter()
            if len(times) == 5 or last - began > PATIENCE:
                break
    return min(times) / size
