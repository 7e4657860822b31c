"""Scores computed without learning (random, norm, batch-norm scale, Taylor): baselines, and the start of PASS.

Every score is one number per channel of a group, higher is better, on a scale that is comparable across groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from passdeploy.channels.blocks import Block, presence
from passdeploy.channels.groups import ChannelGroup
from passdeploy.errors import TrainingError
from passdeploy.models.cloning import named_state
from passdeploy.runtime.distributed import SINGLE_PROCESS, Processes
from passdeploy.runtime.seeds import generator
from passdeploy.sparsity.batch_loss import BatchLoss
from passdeploy.sparsity.batches import Batches, Loss, samples_in
from passdeploy.sparsity.block_gates import BlockGates
from passdeploy.sparsity.flat import FlatChannels
from passdeploy.sparsity.mask import ChannelGradients, batch_statistics_only, producing_slots


def random_scores(groups: Sequence[ChannelGroup], *, seed: int) -> dict[str, Tensor]:
    """Draw uniform scores in [0, 1), which follow from the seed and the group's name."""
    return {g.name: torch.rand(g.width, generator=generator("random scores", seed, g.name)) for g in groups}


def magnitude_scores(model: nn.Module, groups: Sequence[ChannelGroup], *, norm: str = "l1") -> dict[str, Tensor]:
    """Compute filter norms: each layer's norms are divided by their mean, then averaged over the layers of a group.

    `l1` as in Li et al. (arXiv:1608.08710), `l2` as in He et al. (soft filter pruning, arXiv:1808.06866).
    """
    state = dict(named_state(model))
    scores = {}
    for group in groups:
        norms = [
            _filter_norms(state[slot.tensor].detach(), slot.dim, slot.index, norm)
            for slot in producing_slots(group, state)
        ]
        scores[group.name] = torch.stack([values / values.mean().clamp_min(1e-12) for values in norms]).mean(0).cpu()
    return scores


def bn_scale_scores(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """Compute the mean absolute batch-norm scale over a group's norms (network slimming, arXiv:1708.06519).

    A group without a batch norm gets the mean of all other groups' scores.
    """
    scale_of = {
        f"{name}.weight": module.weight.detach().abs()
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None
    }
    scores = {
        group.name: torch.stack(scales).mean(0).cpu() for group in groups if (scales := _scales_of(group, scale_of))
    }
    mean = torch.cat(list(scores.values())).mean() if scores else torch.tensor(1.0)
    return {group.name: scores.get(group.name, mean.expand(group.width)) for group in groups}


def taylor_scores(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Batches,
    loss: Loss,
    *,
    blocks: Sequence[Block] = (),
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """Compute the Taylor importance of every channel and block (Molchanov et al., arXiv:1906.10771, eq. 8).

    It estimates to first order how much the loss changes when a channel is removed: the squared gradient of the loss
    by a gate of 1 on the channel, averaged over batches. A block has its gate where its branch joins its input. Batch
    norms use the statistics of the batch, as they will in fine-tuning.

    Args:
        model: the trained network.
        groups: the groups to score.
        batches: (inputs, targets) on the model's device, or what a `BatchLoss` takes.
        loss: of the network's output and a target, a mean over the batch; or a `BatchLoss`.
        blocks: to score as well.
        processes: that score together, each with its part of every batch.

    Returns:
        Group name -> scores, shape (width,), and `presence` of a block -> its score, shape (1,); on the CPU.

    Raises:
        TrainingError: the loss of the network, or its gradient, is not finite.
    """
    evaluated = batch_statistics_only(model, training=isinstance(loss, BatchLoss))
    channels = FlatChannels.of(groups, blocks)
    device = next(model.parameters()).device
    gates = BlockGates(blocks, device)
    gradients = ChannelGradients(
        dict(evaluated.named_parameters()), groups, torch.arange(channels.channels), channels.channels
    )
    total, count = torch.zeros(channels.total, device=device), 0
    for batch in batches:
        with processes.synchronised_batch_norm():
            if isinstance(loss, BatchLoss):
                with gates.on(evaluated):
                    value = loss(evaluated, batch)
            else:
                with gates.on(evaluated):
                    output = evaluated(batch[0])
                value = loss(output, batch[1])
            *of_weights, of_gates = torch.autograd.grad(value, [*gradients.parameters, gates.values], allow_unused=True)
        _, by_gates = gradients(of_weights)
        if of_gates is not None:
            by_gates = torch.cat([by_gates, of_gates])
        total = total + processes.mean_over_batch(by_gates, samples_in(batch, loss)).square()
        count += 1
    scores = (total / max(count, 1)).cpu()
    if not scores.isfinite().all():
        raise TrainingError(
            "the Taylor importance is not a number: the loss of the trained network, or its gradient, is not finite.\n"
            "Check the weights, the images and the loss."
        )
    return channels.split(scores)


def with_block_sums(scores: Mapping[str, Tensor], blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Add a score of every block to those of groups: the sum over all channels that live only inside it."""
    inside = {block: [scores[name].sum() for name in block.groups if name in scores] for block in blocks}
    return {**scores, **{presence(block.name): torch.stack(sums).sum()[None] for block, sums in inside.items() if sums}}


def _scales_of(group: ChannelGroup, scale_of: Mapping[str, Tensor]) -> list[Tensor]:
    """Collect the scales of a group's channels, one tensor (width,) per batch norm; `scale_of` has them by name."""
    return [
        scale_of[slot.tensor][slot.index.to(scale_of[slot.tensor].device)].mean(1)
        for slot in group.slots
        if slot.tensor in scale_of
    ]


def _filter_norms(weight: Tensor, dim: int, index: Tensor, norm: str) -> Tensor:
    """Compute the norm of each channel's filters, shape (width,); `index` (width, span) are indices along `dim`."""
    powers = weight.abs() if norm == "l1" else weight.square()
    sums = powers.movedim(dim, 0).flatten(1).sum(1)[index.to(weight.device)].sum(1)
    return sums if norm == "l1" else sums.sqrt()
