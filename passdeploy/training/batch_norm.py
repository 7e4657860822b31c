"""Batch-norm statistics measured again, for networks whose channels were cut."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from passdeploy.models.modes import evaluating
from passdeploy.training.placement import device_of, placed_like


def recalibrate_batch_norm_(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Measure the running statistics of every batch norm anew, as plain averages over `batches`.

    After channels are gone, the statistics of the layers behind them describe activations that no
    longer occur. Weights, modes and momenta stay as they are, and dropout is off.

    Raises:
        ValueError: there is no batch.
    """
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    place, has_batch = device_of(model), False
    with torch.no_grad(), evaluating(model):
        for norm in norms:
            norm.momentum = None  # a cumulative average, in the terms of torch
            norm.training = True
        try:
            for images, _ in batches:
                if not has_batch:
                    for norm in norms:
                        norm.reset_running_stats()
                has_batch = True
                model(placed_like(model, images, place))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not has_batch:
        raise ValueError("no batch to measure the statistics of")
