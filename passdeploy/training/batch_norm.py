"""Batch-norm recalibration: measure the running statistics again, after channels were removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from passdeploy.models.modes import evaluating, train_without_chance_
from passdeploy.runtime.seeds import seeded_global_generators
from passdeploy.training.placement import device_of, placed_like

RECALIBRATION_BATCHES = 20  # of which the statistics of a slim network are taken


def recalibrate_batch_norm_(
    model: nn.Module, batches: Iterable[Any], *, run: Callable[[nn.Module, Any], object] | None = None
) -> None:
    """Replace the running statistics of every batch norm by plain averages over `batches`.

    Without the removed channels, the inputs of later layers have other means and variances than the
    statistics say. Weights, modes and momenta stay as they are, and dropout is off. What a network draws at random
    follows from the number of the batch, and the global generators keep their state.

    Args:
        model: the network.
        batches: (inputs, targets), or what `run` takes.
        run: runs the network, which is then in training mode but for dropout, on a batch; None: on its inputs.

    Raises:
        ValueError: there is no batch.
    """
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    device, has_batch = device_of(model), False
    with torch.no_grad(), evaluating(model):
        if run is not None:
            train_without_chance_(model)
        for norm in norms:
            norm.momentum = None  # torch then averages over all batches
            norm.training = True
        try:
            for number, batch in enumerate(batches):
                if not has_batch:
                    for norm in norms:
                        norm.reset_running_stats()
                has_batch = True
                # a network in training mode may draw at random, as detectors sample their proposals
                with seeded_global_generators("recalibrate", number, device=device):
                    if run is None:
                        model(placed_like(model, batch[0], device))
                    else:
                        run(model, batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not has_batch:
        raise ValueError("no batch to measure the statistics of")
