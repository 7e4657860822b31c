"""The network that masks are learned on: what is gone for good is cut out of it, so later steps cost less.

Masks cost as much as a whole network and more. While the budget falls, what is gone stays gone; so as soon as a tenth
of the multiply-adds of the network has gone, it is slimmed for real, with the weights and the optimizer's state that
remain. Slimming is exact, so this changes how long a step takes and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.models.cloning import named_state
from passdeploy.slimming.masked_norms import RestrictedNorms
from passdeploy.slimming.slim import slim
from passdeploy.slimming.tensors import groups_after, put_back_
from passdeploy.sparsity.mask import MaskedWeights, batch_statistics_only, run_with, straight_through
from passdeploy.sparsity.weight_trainer import CoTrainedWeights

SLACK = 0.1  # share of the network's multiply-adds that masks may hide before they are cut out
_LEAST = 1e-12  # factor of the score of what is gone


class ShrinkingNetwork:
    """A network under masks that follows them down.

    Args:
        model: the trained network; it is left as it was.
        cut: its prunable groups.
        costs: prices their widths.
        rehearsal: a copy of `model` that learns along; None: the weights are frozen.
    """

    def __init__(
        self, model: nn.Module, cut: Sequence[ChannelGroup], costs: CostModel, co_trained: CoTrainedWeights | None
    ) -> None:
        self._model, self._cut, self._costs, self._co_trained = model, tuple(cut), costs, co_trained
        self._kept = {group.name: tuple(range(group.width)) for group in cut}  # channels that the network still has
        self._left = dict(self._kept)  # of these, what masks left in the last step
        self._follow(co_trained.network if co_trained else model, self._cut)

    def demoted(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scores, those of channels that are gone for good far below all others of their group."""
        found = {}
        for name, values in scores.items():
            found[name] = values.detach() * _LEAST
            found[name][list(self._left[name])] = values.detach()[list(self._left[name])]
        return found

    def within(self, plan: Plan) -> Plan:
        """`plan` without what is gone for good."""
        return Plan({name: tuple(sorted({*kept} & {*self._left[name]})) for name, kept in plan.kept.items()})

    def run(self, scores: Mapping[str, Tensor], plan: Plan, inputs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """What the network that `plan` leaves says of `inputs`, and the gates on the channels that it has.

        The output's gradient reaches the scores straight through the masks, and every gate.

        Args:
            scores: group name -> (width,), of all channels.
            plan: within what the network still has.
            inputs: a batch.
        """
        masks = {}
        for name, score in scores.items():
            hard = torch.zeros_like(score)
            hard[list(plan.kept[name])] = 1.0
            masks[name] = straight_through(hard, score)[list(self._kept[name])]
        gates = {name: mask.clone() for name, mask in masks.items()}
        for gate in gates.values():
            gate.retain_grad()
        weights = self._weights(masks, gates)
        with RestrictedNorms(self._weights.existing(masks, weights)):
            return run_with(self._learner, weights, inputs), gates

    def gate_gradients(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Group name -> slope of a loss by the gate of every channel, shape (width,); zero where a channel is gone."""
        found = {}
        for group in self._cut:
            gate = gates[group.name]
            found[group.name] = gate.new_zeros(group.width, requires_grad=False)
            if gate.grad is not None:
                found[group.name][list(self._kept[group.name])] = gate.grad
        return found

    def shrink_(self, plan: Plan) -> bool:
        """What `plan` drops is gone; cut it out if that is worth it, and return whether it was.

        To be called before a step, while there are no gradients.
        """
        self._left = {name: tuple(kept) for name, kept in plan.kept.items()}
        widths = {name: len(kept) for name, kept in self._kept.items()}
        if self._costs.of("macs", plan.widths()) > (1 - SLACK) * self._costs.of("macs", widths):
            return False
        place = {name: {channel: at for at, channel in enumerate(kept)} for name, kept in self._kept.items()}
        step = Plan({name: tuple(place[name][channel] for channel in kept) for name, kept in plan.kept.items()})
        sizes = {name: tensor.shape for name, tensor in self._tensors(self._network).items()}
        if self._co_trained:
            self._co_trained.cut_(self._groups, step)
            network = self._co_trained.network
        else:
            network = slim(self._network, self._groups, step)
        self._kept = dict(self._left)
        self._follow(network, groups_after(self._groups, step, sizes))
        return True

    def whole(self) -> nn.Module:
        """A network of the original's shapes with the weights that were learned; what is gone is as in the original."""
        restored = copy.deepcopy(self._model)
        put_back_(self._tensors(restored), self._tensors(self._network), self._cut, Plan(self._kept))
        return restored

    def _follow(self, network: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        self._network, self._groups = network, tuple(groups)
        self._learner = batch_statistics_only(network)
        self._weights = MaskedWeights(network, groups, is_trained=self._co_trained is not None)

    @staticmethod
    def _tensors(network: nn.Module) -> dict[str, Tensor]:
        return dict(named_state(network))
