"""Growing regularisation: train with a growing penalty on the channels that will be removed, so that they reach zero.

Source: Wang et al., Neural Pruning via Growing Regularization (arXiv:2012.09243), GReg-1: the channels to
remove are chosen first (there by their norm); a penalty on their weights then grows step by step to its ceiling. Here
the penalty is on every slice that a removed channel owns, including its normalisation and its consumers, because the
scale of a filter in front of a batch norm alone changes nothing. As in PASS, the weights are trained in these steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from passdeploy.channels.blocks import Block, tensors_of
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.errors import TrainingError
from passdeploy.models.cloning import deep_copy
from passdeploy.runtime.distributed import SINGLE_PROCESS, Processes
from passdeploy.runtime.events import Stage, silent
from passdeploy.runtime.seeds import seeded_global_generators
from passdeploy.sparsity.batches import Stream, repeated
from passdeploy.training.deferred import DeferredScalars, StepReport, steps_per_report
from passdeploy.training.losses import DistillationLoss
from passdeploy.training.optimizers import make_optimizer
from passdeploy.training.saving import Checkpoint, saving
from passdeploy.training.state import TrainState
from passdeploy.training.step import divergence, gradient_step_

if TYPE_CHECKING:
    from passdeploy.recipe import OptimizerSpec


def grow_penalty(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: Plan,
    batches: Stream,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    optimizer: OptimizerSpec,
    ceiling: float = 1.0,
    ramp: float = 0.75,
    distillation: DistillationLoss | None = None,
    blocks: Sequence[Block] = (),
    seed: int = 0,
    stage: Stage | None = None,
    processes: Processes = SINGLE_PROCESS,
    checkpoint: Checkpoint | None = None,
) -> nn.Module:
    """Train a copy of `model` while a penalty drives the channels that `plan` removes towards zero.

    Args:
        model: the trained network; it is left as it was.
        groups: the network's groups.
        plan: the channels that will be kept.
        batches: (inputs, targets) on the model's device, iterated again and again as by `learn_masks`.
        loss: of the network's output and a target.
        steps: of training.
        optimizer: of the weights; its learning rate stays the same.
        ceiling: the penalty's factor at the end; it adds `factor * weight` to a gradient.
        ramp: share of the steps over which the factor grows, in a straight line.
        distillation: adds the outputs of a teacher to the loss; only for networks that classify.
        blocks: of the network; the penalty is on all weights of those that `plan` skips.
        seed: key of dropout.
        stage: hears of every step.
        processes: that train together, each with its part of every batch.
        checkpoint: as for `learn_masks`.

    Raises:
        TrainingError: the loss, or a weight after the last step, is not finite.
        DataError: there are no batches, or they can be walked only once and are too few.
        RunError: the checkpoint was made with other settings.
    """
    stage = stage or Stage("grow", silent)
    trained = deep_copy(model).train()
    removed = {
        parameter: mask
        for name, parameter in trained.named_parameters()
        if (mask := _removed_mask(name, parameter, groups, plan)) is not None
    }
    gone = tensors_of(blocks, plan.skipped)
    removed |= {p: torch.ones_like(p, requires_grad=False) for name, p in trained.named_parameters() if name in gone}
    parameters = list(trained.parameters())
    updates, lr = make_optimizer(trained, optimizer), optimizer.lr
    settings = {
        "steps": steps,
        "optimizer": optimizer.model_dump(mode="json"),
        "ceiling": ceiling,
        "ramp": ramp,
        "seed": seed,
        "plan": plan.to_json(),
    }
    state = TrainState(trained, updates, settings)
    if saved := checkpoint.load() if checkpoint else None:
        state.load_state_dict(*saved)
    device = parameters[0].device
    deferred = DeferredScalars(every=steps_per_report(device))
    with saving(checkpoint, processes) as saves:
        left = islice(repeated(batches, state.step), steps - state.step)
        for step, (images, targets) in enumerate(left, start=state.step):
            updates.zero_grad()
            with seeded_global_generators("grow", seed, step, processes.rank, device=device):
                with processes.synchronised_batch_norm():
                    output = trained(images)
                    value = loss(output, targets)
                    if distillation:
                        value = distillation.loss_of_output(value, output, images, targets)
                factor = ceiling * min(1.0, (step + 1) / max(1.0, ramp * steps))
                value, mean_loss = processes.over_batch(value, len(images))
                _report(deferred.add(step, loss=mean_loss, penalty=factor), stage, steps, lr)
                penalise_ = partial(_add_penalty_gradient_, removed, factor)
                gradient_step_(value, {updates: parameters}, processes, change_gradients_=penalise_)
            state.step += 1
            if saves.is_wanted(deferred):
                _report(deferred.flush(), stage, steps, lr)
                saves.save(state)
    _report(deferred.flush(), stage, steps, lr)
    _require_convergence(divergence(0.0, parameters), steps - 1, lr)
    updates.zero_grad()
    return trained.train(model.training)


def _report(reports: Sequence[StepReport], stage: Stage, steps: int, lr: float) -> None:
    """Report steps, unless the loss of one is not finite, which is a TrainingError."""
    for report in reports:
        _require_convergence(divergence(report.values["loss"]), report.step, lr)
        stage.step(report.step + 1, steps, **report.values)


def _require_convergence(problem: str | None, step: int, lr: float) -> None:
    if problem:
        raise TrainingError(
            f"{problem} at step {step + 1} of growing regularisation, with a learning rate of {lr:.3g}.\n"
            "Lower finetune.optimizer.lr, or check the data."
        )


def _add_penalty_gradient_(removed: Mapping[nn.Parameter, Tensor], factor: float) -> None:
    """Add the gradient of the penalty, `factor * weight` where the mask of a parameter is 1, to `parameter.grad`."""
    found = [(p.grad, p.detach(), mask) for p, mask in removed.items() if p.grad is not None]
    if found:
        gradients, weights, masks = (list(tensors) for tensors in zip(*found, strict=True))
        torch._foreach_addcmul_(gradients, weights, masks, value=factor)


def _removed_mask(name: str, parameter: Tensor, groups: Sequence[ChannelGroup], plan: Plan) -> Tensor | None:
    """Build a parameter's mask, in its shape: 1 on removed channels, else 0; None if it keeps all of its channels."""
    mask: Tensor | None = None
    for group in groups:
        removed = plan.removed(group)
        for slot in group.slots if len(removed) else ():
            if slot.tensor == name:
                mask = torch.zeros_like(parameter, requires_grad=False) if mask is None else mask
                mask.index_fill_(slot.dim, slot.index[removed].flatten().to(parameter.device), 1.0)
    return mask
