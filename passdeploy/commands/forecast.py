"""Forecast of the time that a run will take on this machine, from a few training steps on a copy of the network."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from passdeploy.models.cloning import deep_copy
from passdeploy.models.modes import evaluating
from passdeploy.runtime.determinism import deterministic_algorithms
from passdeploy.training.losses import logits_of
from passdeploy.training.optimizers import make_optimizer

if TYPE_CHECKING:
    from passdeploy.commands.prepare import Prepared
    from passdeploy.recipe import PruneSpec

SMALL_BATCH = 8  # images of the first timed steps; a whole batch of a large network could take too long
TIMED_STEPS, MAX_SECONDS = 4, 3.0  # timing ends after this many steps or seconds, whichever comes first
BACKWARD_FACTOR = 2.0  # a backward pass takes about as long as two forward passes


def forecast(prepared: Prepared, device: torch.device) -> dict[str, float]:
    """Estimate the seconds of each stage: `dense` (evaluation only if its weights are trained), `learn`, `finetune`.

    Fine-tuning is counted at the size of the dense network, so it will be faster; with several targets it is that of
    all their runs. The measurements of a latency target are not counted.

    Args:
        prepared: the recipe with its network and data.
        device: to run on.
    """
    recipe, data = prepared.recipe, prepared.data
    per_image = _seconds_per_image(prepared, device)
    with_teacher = 1 + 1 / (1 + BACKWARD_FACTOR)  # factor of the teacher's forward pass
    batch = min(recipe.prune.batch_size or recipe.data.batch_size, len(data.train))
    epoch, test = per_image * len(data.train), per_image * len(data.test) / (1 + BACKWARD_FACTOR)
    is_taken = recipe.prune.takes_plan or recipe.prune.takes_snapshot
    is_learned = recipe.prune.method in ("pass", "growing") and not is_taken
    learn = recipe.prune.steps * per_image * batch * (with_teacher if recipe.prune.distill else 1)
    teaching = epoch * (with_teacher if recipe.finetune.distill else 1)
    finetune = 2 * test + recipe.finetune.epochs * teaching
    larger = recipe.prune.larger_targets
    learned = recipe.prune.steps * batch / len(data.train) if recipe.prune.weights == "trained" else 0.0  # epochs
    epochs_more = sum(round(_left_after(recipe.prune, share) * learned) for share in larger)
    return {
        "dense": test + (0 if prepared.is_trained else recipe.train.epochs * epoch),
        "learn": learn if is_learned else 0.0,
        "finetune": (1 + len(larger)) * finetune + epochs_more * teaching,
    }


def _left_after(prune: PruneSpec, share: float) -> float:
    """Return the share of mask learning that is left when its budget passes a larger one (`MaskObjective.limit_at`)."""
    excess = (share - prune.target.value) / (1 - prune.target.value)
    return float(1 - prune.anneal * (1 - excess ** (1 / 3)))


def _seconds_per_image(prepared: Prepared, device: torch.device) -> float:
    """Time steps of dense training, image loading included; with the recipe's batch size if such steps are short."""
    data, spec = prepared.data, prepared.recipe.train
    memory_format = torch.channels_last if spec.channels_last else torch.contiguous_format
    network = deep_copy(prepared.dense).to(device, memory_format=memory_format)  # type: ignore[call-overload]
    optimizer = make_optimizer(network, spec.optimizer)
    few, many = (min(size, len(data.train)) for size in (SMALL_BATCH, prepared.recipe.data.batch_size))

    def fastest_step(size: int) -> float:
        """Return the seconds of the fastest of a few steps."""
        times, began = list[float](), perf_counter()
        last = began
        changes = spec.random_changes
        for images, labels in data.train.batches(size, epoch=0, seed=0, augment=changes, drop_last=True, device=device):
            optimizer.zero_grad()
            on_device = images.to(device, memory_format=memory_format)
            loss = F.cross_entropy(logits_of(network(on_device)), labels.to(device))
            loss.backward()
            optimizer.step()
            loss.item()  # waits for the device
            times.append(perf_counter() - last)
            last = perf_counter()
            if len(times) == TIMED_STEPS or last - began > MAX_SECONDS:
                break
        return min(times)

    is_deterministic = deterministic_algorithms(prepared.recipe.deterministic, device, network=network)
    with is_deterministic, evaluating(network, training=True), torch.random.fork_rng():
        per_image = fastest_step(few) / few
        return fastest_step(many) / many if few < many and per_image * many < MAX_SECONDS / 2 else per_image
