"""Objective of mask learning: scores -> a plan within the budget -> the loss of the masked network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from passdeploy.channels.allocation import Budget, choose_channels
from passdeploy.channels.blocks import presence
from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan, Scores
from passdeploy.models.cloning import deep_copy
from passdeploy.models.prompt import VisualPrompt
from passdeploy.recipe import OptimizerSpec
from passdeploy.sparsity.batch_loss import BatchLoss
from passdeploy.sparsity.batches import Loss, samples_in
from passdeploy.sparsity.settings import PassSettings
from passdeploy.sparsity.shrinking import ShrinkingNetwork
from passdeploy.sparsity.weight_trainer import CoTrainedWeights
from passdeploy.training.losses import DistillationLoss

_PLANS = 30  # made while masks are learned, at least
_LONGEST_INTERVAL = 10  # steps between two plans
_SPENT = 0.98  # of the budget: a plan that leads to less is made with more care


class MaskObjective:
    """Plans, budget and loss of the masked network.

    Args:
        model: the trained network; it is left as it was.
        groups: its prunable groups.
        loss: of the network's output and a target, a mean over the batch; or a `BatchLoss`.
        costs: of the groups' widths.
        budget: of the last step.
        settings: of mask learning.
        teacher: of distillation, where the settings ask for it.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        loss: Loss,
        costs: CostModel,
        budget: Budget,
        settings: PassSettings,
        teacher: nn.Module,
    ) -> None:
        self.groups, self._loss, self._costs, self.budget, self.settings = groups, loss, costs, budget, settings
        self.co_trained = None
        if settings.weights != "frozen":
            self.co_trained = CoTrainedWeights(model, settings.weights_optimizer or OptimizerSpec(lr=0.01))
        self.network = ShrinkingNetwork(
            model,
            groups,
            costs,
            self.co_trained,
            fade_steps=settings.fade_steps,
            training=isinstance(loss, BatchLoss),
        )
        self._distillation = _distillation_loss(teacher, settings) if settings.distill else None
        self.dense_cost = costs.of(budget.kind)

    def plan(self, scores: Tensor, limit: int) -> Plan:
        """Choose the channels and blocks with the highest scores, of those that were not removed before.

        Scores are compared per unit of what a channel costs. In the dense network a channel of a residual stream costs
        what all the wide layers on it cost; once these are narrow it costs a fraction, and its dense price would leave
        the stream too narrow; see `_price_widths`.

        What is removed never comes back, and where widths go in coarse steps the cheap channels may run out before the
        target is met: the last plan would have to remove a whole step of a stream and leave much of the budget unspent.
        So a plan that would end like that keeps what a plan for the target itself, made now, would keep.

        Args:
            scores: of all of them, as `FlatChannels` orders them; they are copied to the host.
            limit: of the budget.
        """
        scores = scores.detach().cpu()
        ranked = self.network.channels.split(self.network.demote_removed(scores))
        plan = self._choose(ranked, limit, is_last=False)
        if self._cost(plan) < self.budget.limit:
            return self._choose(ranked, limit, is_last=True)  # what goes beyond the target never comes back
        if self._last_cost(scores, plan) < _SPENT * self.budget.limit:
            goal = self._choose(ranked, self.budget.limit, is_last=True)
            there = {presence(block.name): 1 for block in self._costs.blocks}
            careful = self._choose(ranked, limit, is_last=False, keep=there | goal.widths())
            plan = max(plan, careful, key=partial(self._last_cost, scores))
        return plan

    def _last_cost(self, scores: Tensor, plan: Plan) -> int:
        """Return what a plan for the target would cost that is made by the same scores, of what `plan` keeps."""
        kept = self.network.kept & self.network.channels.mask(plan)
        ranked = self.network.channels.split(self.network.demote_removed(scores, kept))
        last = self._choose(ranked, self.budget.limit, is_last=True)
        return self._cost(self.network.channels.plan(self.network.channels.mask(last) & kept))

    def _cost(self, plan: Plan) -> int:
        return self._costs.of(self.budget.kind, plan.widths())

    def _choose(self, ranked: Scores, limit: int, *, is_last: bool, keep: Mapping[str, int] | None = None) -> Plan:
        plan = choose_channels(
            ranked,
            self.groups,
            self._costs,
            Budget(self.budget.kind, limit),
            round_to=self.settings.round_to,
            per_cost=self.settings.per_cost,
            allocation=self.settings.allocation,
            priced_at=self._price_widths(),
            is_last=is_last,
            keep=keep,
        )
        return self.network.without_removed(plan)

    def _price_widths(self) -> dict[str, int] | None:
        """Return the widths at which channels are priced: the geometric mean of the dense ones and those left.

        Where training is short, prices of the dense network end best, and where it is long, those of the network that
        is left; between them it ends as well as the better of the two (`benchmarks/results/accuracy-trials.md`). A
        latency is priced in the dense network (None): its table says little of single narrow channels.
        """
        if self.budget.kind == "latency":
            return None
        masks = self.network.channels.split(self.network.kept)
        return {name: max(1, round(math.sqrt(len(mask) * int(mask.sum())))) for name, mask in masks.items()}

    def plan_limits(self) -> list[int | None]:
        """Return the budget of the plan at every step that makes a new one, None for all others.

        A plan needs the scores on the host, which a GPU should not wait for in every step. So there is one for every
        thirtieth of the steps, or for every tenth step where that is more often: each removes about a tenth of what is
        left to remove. The last one, which meets the target, is made as soon as the target is due.
        """
        interval = max(1, min(_LONGEST_INTERVAL, self.settings.steps // _PLANS))
        limits, current, target = list[int | None](), None, self.limit_at(self.settings.steps)
        for step in range(self.settings.steps):
            limit = self.limit_at(step)
            is_due = limit != current and (step % interval == 0 or limit == target)
            current = limit if is_due else current
            limits.append(limit if is_due else None)
        return limits

    def limit_at(self, step: int) -> int:
        """Return the budget at `step`: it shrinks from the dense cost to the target, then stays there.

        The excess over the target falls with the cube of the remaining time (Zhu and Gupta, arXiv:1710.01878, eq. 1):
        fast at first, while many channels can be removed at little loss, and slowly at the end.
        """
        ramp = self.settings.anneal * self.settings.steps
        excess = (1 - min(1.0, (step + 1) / ramp)) ** 3 if ramp else 0.0
        return round(self.budget.limit + (self.dense_cost - self.budget.limit) * excess)

    def samples_in(self, batch: Any) -> int:
        """Count the samples of a batch; see `batches.samples_in`."""
        return samples_in(batch, self._loss)

    def loss(self, prompt: VisualPrompt | None, batch: Any) -> Tensor:
        """Compute the loss of the masked network; its gradients reach the weights, and the prompt, if there is one.

        Args:
            prompt: to add to the images; None with a `BatchLoss`.
            batch: images and targets, or what the `BatchLoss` takes.
        """
        if isinstance(compute := self._loss, BatchLoss):
            value: Tensor = self.network.run_by(lambda network: compute(network, batch))
            return value
        images, targets = batch
        output = self.network.run(prompt(images).to(images.dtype) if prompt else images)
        loss = compute(output, targets)
        if self._distillation:
            loss = self._distillation.loss_of_output(loss, output, images, targets)
        return loss


def _distillation_loss(teacher: nn.Module, settings: PassSettings) -> DistillationLoss:
    """Build the distillation loss with a copy of the teacher in evaluation mode; the parameters are shared."""
    evaluated = deep_copy(teacher, {id(p): p for p in teacher.parameters()}).eval()
    return DistillationLoss(evaluated, settings.distill, settings.temperature, settings.only_better)
