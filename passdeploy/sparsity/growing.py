"""Growing regularisation: push to zero what will be cut, harder and harder, while the rest learns to do without.

Source: Wang et al., Neural Pruning via Growing Regularization (arXiv:2012.09243), GReg-1: the channels that go are
chosen first (there by their norm); a penalty on their weights then grows step by step to its ceiling. Here the penalty
is on every slice that a removed channel owns, its normalisation and its consumers among them: before a batch norm the
scale of a filter alone changes nothing. Like PASS it trains the weights, so its steps are fine-tuning too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.errors import TrainingError
from passdeploy.runtime.distributed import SINGLE_PROCESS, Processes
from passdeploy.runtime.events import Stage, silent
from passdeploy.sparsity.baselines import Loss
from passdeploy.training.losses import DistillationLoss, logits_of


def grow_penalty(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: Plan,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
    *,
    steps: int,
    lr: float,
    ceiling: float = 1.0,
    ramp: float = 0.75,
    distillation: DistillationLoss | None = None,
    stage: Stage | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> nn.Module:
    """A copy of `model` trained until the channels that `plan` drops matter little.

    Args:
        model: the trained network; it is left as it was.
        groups: the network's groups.
        plan: what will be kept.
        batches: (inputs, targets) on the model's device, at least `steps` of them.
        loss: of the network's output and a target.
        steps: of SGD with Nesterov momentum of 0.9 at the constant rate `lr`.
        lr: learning rate.
        ceiling: the penalty's factor at the end; it adds `factor * weight` to a gradient.
        ramp: share of the steps over which the factor grows, in a straight line.
        imitation: what a teacher's answers add to the loss; for class scores only.
        stage: told about every step.
        processes: that train together, each with its part of every batch.

    Raises:
        TrainingError: the loss is not a number.
    """
    stage = stage or Stage("grow", silent)
    trained = copy.deepcopy(model).train()
    fading = {parameter: faded for name, parameter in trained.named_parameters()
              if (faded := _removed(name, parameter, groups, plan)) is not None}  # fmt: skip
    parameters = list(trained.parameters())
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True)
    for step, (images, targets) in enumerate(islice(batches, steps)):
        with processes.synchronised_batch_norm():
            output = trained(images)
            value = loss(output, targets)
            if distillation:
                each = partial(F.cross_entropy, target=targets, reduction="none")
                value = distillation.loss(value, logits_of(output), images, each)
        found = float(processes.mean_over_batch(value.detach(), len(images)))
        if not abs(found) < float("inf"):
            raise TrainingError(
                f"the loss is {found} at step {step + 1} of growing regularisation, with a learning rate of {lr:.3g}.\n"
                "Lower finetune.optimizer.lr, or check the data."
            )
        optimizer.zero_grad()
        with processes.synchronised_batch_norm():
            value.backward()
        processes.average_gradients_(parameters)
        factor = ceiling * min(1.0, (step + 1) / max(1.0, ramp * steps))
        for parameter, faded in fading.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() * faded, alpha=factor)
        optimizer.step()
        stage.step(step + 1, steps, loss=found, penalty=factor)
    optimizer.zero_grad()
    return trained.train(model.training)


def _removed(name: str, parameter: Tensor, groups: Sequence[ChannelGroup], plan: Plan) -> Tensor | None:
    """1 where a parameter belongs to a channel that goes, in the parameter's shape; None where nothing of it goes."""
    faded: Tensor | None = None
    for group in groups:
        gone = plan.removed(group)
        for slot in group.slots if len(gone) else ():
            if slot.tensor == name:
                faded = torch.zeros_like(parameter, requires_grad=False) if faded is None else faded
                faded.index_fill_(slot.dim, slot.index[gone].flatten().to(parameter.device), 1.0)
    return faded
