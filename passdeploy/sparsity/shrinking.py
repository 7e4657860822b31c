"""Masked network of mask learning, slimmed during learning so that later steps cost less.

A masked network costs more than the dense one. While the budget shrinks, a removed channel never comes back; so as soon
as masks hide a tenth of the network's multiply-adds, the network is slimmed, and with it the optimiser state of its
weights. Slimming is exact: this changes how long a step takes and nothing else.
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
_REMOVED_FACTOR = 1e-12  # of the score of a removed channel


class ShrinkingNetwork:
    """Masked network without the channels that masks removed earlier.

    Args:
        model: the trained network; it is left as it was.
        groups: its prunable groups.
        costs: of the groups' widths.
        co_trained: a copy of `model` that is trained with the masks; None: the weights are frozen.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[ChannelGroup], costs: CostModel, co_trained: CoTrainedWeights | None
    ) -> None:
        self._model, self._groups, self._costs, self._co_trained = model, tuple(groups), costs, co_trained
        self._present = {group.name: tuple(range(group.width)) for group in groups}  # channels that the network has
        self._unmasked = dict(self._present)  # those of them that no mask has removed yet
        self._use_network_(co_trained.network if co_trained else model, self._groups)

    def demote_removed(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the scores, with those of removed channels far below all others of their group."""
        demoted = {}
        for name, values in scores.items():
            unmasked = list(self._unmasked[name])
            demoted[name] = values.detach() * _REMOVED_FACTOR
            demoted[name][unmasked] = values.detach()[unmasked]
        return demoted

    def without_removed(self, plan: Plan) -> Plan:
        """Copy `plan` without the channels that were removed before."""
        return Plan({name: tuple(sorted({*kept} & {*self._unmasked[name]})) for name, kept in plan.kept.items()})

    def run(self, scores: Mapping[str, Tensor], plan: Plan, inputs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """Run the network masked by `plan`; return its output and the gates on the channels that it has.

        The gradient of the output reaches every gate and, straight through the masks, the scores.

        Args:
            scores: group name -> (width,), of all channels.
            plan: keeps only channels that were not removed before.
            inputs: a batch.
        """
        masks = {}
        for name, score in scores.items():
            hard = torch.zeros_like(score)
            hard[list(plan.kept[name])] = 1.0
            masks[name] = straight_through(hard, score)[list(self._present[name])]
        gates = {name: mask.clone() for name, mask in masks.items()}
        for gate in gates.values():
            gate.retain_grad()
        weights = self._weights(masks, gates)
        with RestrictedNorms(self._weights.kept_masks(masks, weights)):
            return run_with(self._evaluated, weights, inputs), gates

    def gate_gradients(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Collect the gradients of a loss by the gates: group name -> (width,); zero for removed channels."""
        gradients = {}
        for group in self._groups:
            gate = gates[group.name]
            gradients[group.name] = gate.new_zeros(group.width, requires_grad=False)
            if gate.grad is not None:
                gradients[group.name][list(self._present[group.name])] = gate.grad
        return gradients

    def shrink_(self, plan: Plan) -> bool:
        """Remove all channels that `plan` does not keep; slim the network if that saves enough, and return if it did.

        Called before the forward pass of a step.
        """
        self._unmasked = {name: tuple(kept) for name, kept in plan.kept.items()}
        widths = {name: len(kept) for name, kept in self._present.items()}
        if self._costs.of("macs", plan.widths()) > (1 - SLACK) * self._costs.of("macs", widths):
            return False
        relative = self._relative(plan)
        sizes = {name: tensor.shape for name, tensor in self._tensors(self._network).items()}
        if self._co_trained:
            self._co_trained.slim_(self._network_groups, relative)
            network = self._co_trained.network
        else:
            network = slim(self._network, self._network_groups, relative)
        self._present = dict(self._unmasked)
        self._use_network_(network, groups_after(self._network_groups, relative, sizes))
        return True

    def _relative(self, plan: Plan) -> Plan:
        """Number the channels of `plan` as in the network that is present."""
        index_of = {name: {c: index for index, c in enumerate(present)} for name, present in self._present.items()}
        return Plan({name: tuple(index_of[name][channel] for channel in kept) for name, kept in plan.kept.items()})

    def restored(self) -> nn.Module:
        """Copy the original network, with the trained weights of the channels that are present."""
        restored = copy.deepcopy(self._model)
        put_back_(self._tensors(restored), self._tensors(self._network), self._groups, Plan(self._present))
        return restored

    def _use_network_(self, network: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        """Mask `network`, whose groups are `groups`, from now on."""
        self._network, self._network_groups = network, tuple(groups)
        self._evaluated = batch_statistics_only(network)
        self._weights = MaskedWeights(network, groups, is_trained=self._co_trained is not None)

    @staticmethod
    def _tensors(network: nn.Module) -> dict[str, Tensor]:
        return dict(named_state(network))
