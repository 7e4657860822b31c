"""Gradient step that all training loops share, and the check for divergence.

The loops (`training/loop.py`, mask learning in `sparsity/learn.py`, growing regularisation in `sparsity/growing.py`)
differ in their forward pass. All continue from the loss in the same way: backward pass, gradients averaged over the
processes, optimiser update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from passdeploy.runtime.distributed import SINGLE_PROCESS, Processes


def gradient_step_(
    loss: Tensor,
    optimizers: Mapping[torch.optim.Optimizer, Sequence[Tensor]],
    processes: Processes = SINGLE_PROCESS,
    *,
    scaler: torch.amp.GradScaler | None = None,
    change_gradients_: Callable[[], object] | None = None,
) -> None:
    """Differentiate a loss and update the parameters; gradients must have been zeroed before the forward pass.

    Args:
        loss: a scalar, of this process's part of the batch.
        optimizers: each with its parameters, whose gradients are averaged over the processes in one message per
            optimiser (the data types of two optimisers may differ).
        processes: that train together.
        scaler: of the loss, in fp16.
        change_gradients_: called before the update, when gradients are averaged and unscaled; clips them, or adds a
            penalty.
    """
    with processes.synchronised_batch_norm():
        torch.autograd.backward(scaler.scale(loss) if scaler else loss)
    for optimizer, parameters in optimizers.items():
        processes.average_gradients_(parameters)
        if scaler:
            scaler.unscale_(optimizer)
    if change_gradients_:
        change_gradients_()
    for optimizer in optimizers:
        if scaler:
            scaler.step(optimizer)
        else:
            optimizer.step()
    if scaler:
        scaler.update()


def divergence(loss: float, parameters: Iterable[Tensor] = ()) -> str | None:
    """Say what is not finite, the loss or one of the parameters, as the start of an error message; None if all are."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    finite = [parameter.isfinite().all() for parameter in parameters]
    if finite and not torch.stack(finite).all():  # read once, not per parameter
        return "a weight is not a number"
    return None
