"""How long a run will take on this machine, from a few steps that are timed and thrown away."""

from __future__ import annotations

import copy
from time import perf_counter
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from passdeploy.models.modes import evaluating
from passdeploy.training.losses import logits_of
from passdeploy.training.optimizers import make_optimizer

if TYPE_CHECKING:
    from passdeploy.commands.prepare import Prepared

FEW = 8  # images of the first timed steps; a whole batch of a large network would take too long
STEPS, PATIENCE = 4, 3.0  # steps that are timed, or seconds after which no further one is
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
    taught = 1 + 1 / (1 + _BACKWARD)  # with a teacher's forward pass
    batch = min(recipe.prune.batch_size or recipe.data.batch_size, len(data.train))
    epoch, test = image * len(data.train), image * len(data.test) / (1 + _BACKWARD)
    is_learned = recipe.prune.method in ("pass", "growing") and not recipe.prune.takes_plan
    learn = recipe.prune.steps * image * batch * (taught if recipe.prune.distill else 1)
    return {
        "dense": test + (0 if prepared.is_trained else recipe.train.epochs * epoch),
        "learn": learn if is_learned else 0.0,
        "finetune": 2 * test + recipe.finetune.epochs * epoch * (taught if recipe.finetune.distill else 1),
    }


def _seconds_per_image(prepared: Prepared, device: torch.device) -> float:
    """Of a step of dense training, loading the images included; in whole batches where those do not take long."""
    data, spec = prepared.data, prepared.recipe.train
    order = torch.channels_last if spec.channels_last else torch.contiguous_format
    network = copy.deepcopy(prepared.dense).to(device, memory_format=order)  # type: ignore[call-overload]
    optimizer = make_optimizer(network, spec.optimizer)
    few, many = (min(size, len(data.train)) for size in (FEW, prepared.recipe.data.batch_size))

    def fastest(size: int) -> float:
        """Seconds of the fastest of a few steps."""
        times, began = list[float](), perf_counter()
        last = began
        for images, labels in data.train.batches(size, epoch=0, seed=0, augment=True, drop_last=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(logits_of(network(images.to(device, memory_format=order))), labels.to(device))
            loss.backward()
            optimizer.step()
            loss.item()  # waits for the device
            times.append(perf_counter() - last)
            last = perf_counter()
            if len(times) == STEPS or last - began > PATIENCE:
                break
        return min(times)

    with evaluating(network, training=True), torch.random.fork_rng():
        each = fastest(few) / few
        return fastest(many) / many if few < many and each * many < PATIENCE / 2 else each
