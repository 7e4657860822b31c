"""Masked network of mask learning, slimmed during learning so that later steps cost less.

While the budget shrinks, a removed channel never comes back. Its slices of the weights are set to zero when it is
removed, and as soon as zeros hide a tenth of the network's multiply-adds, the network is slimmed, and with it the
optimiser state of its weights. Slimming is exact: this changes how long a step takes and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.models.cloning import deep_copy, named_state
from passdeploy.slimming.masked_norms import KeptMask, RestrictedNorms
from passdeploy.slimming.slim import slim
from passdeploy.slimming.tensors import cut_tensors, groups_after, put_back_, removed_indices
from passdeploy.sparsity.flat import FlatChannels
from passdeploy.sparsity.mask import ChannelGradients, batch_statistics_only
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
        self.channels = FlatChannels.of(groups)
        self._present = torch.ones(self.channels.total, dtype=torch.bool)  # channels that the network has
        self._norms: RestrictedNorms | None = None  # where channels are masked
        self._has_norms = True  # that depend on which channels there are, such as layer norms; unless none is met
        self.kept = self._present.clone()  # those of them that no mask has removed yet; on the CPU
        self._use_network_(co_trained.network if co_trained else deep_copy(model), self._groups)

    def demote_removed(self, scores: Tensor) -> Tensor:
        """Copy the scores, on the CPU and (channels,), with those of removed channels far below all others."""
        return torch.where(self.kept, scores, scores * _REMOVED_FACTOR)

    def without_removed(self, plan: Plan) -> Plan:
        """Copy `plan` without the channels that were removed before."""
        return self.channels.plan(self.channels.mask(plan) & self.kept)

    def run(self, inputs: Tensor) -> Any:
        """Run the masked network on a batch; `channel_gradients` follow from the backward pass after it."""
        for parameter in self._parameters:
            parameter.grad = None
        if self._norms is None:
            return self._evaluated(inputs)
        with self._norms:
            output = self._evaluated(inputs)
        if not self._norms.was_used:  # a network without such norms is not watched any more, which takes time
            self._has_norms, self._norms = False, None
        return output

    def channel_gradients(self) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a loss by all masks and by all gates, each (channels,); zero for removed channels.

        Called after the backward pass, before the weights are changed.
        """
        return self._gradients([parameter.grad for parameter in self._gradients.parameters])

    def shrink_(self, plan: Plan) -> bool:
        """Remove all channels that `plan` does not keep; slim the network if that saves enough, and return if it did.

        Called before the forward pass of a step.
        """
        kept = self.channels.mask(plan) & self.kept
        if torch.equal(kept, self.kept):
            return False
        self.kept = kept
        if self._macs(kept) > (1 - SLACK) * self._macs(self._present):
            self._remove_weights_()
            return False
        relative = self._relative()
        sizes = {name: tensor.shape for name, tensor in self._tensors(self._network).items()}
        if self._co_trained:
            self._co_trained.slim_(self._network_groups, relative)
            network = self._co_trained.network
        else:
            network = slim(self._network, self._network_groups, relative)
        self._present = kept.clone()
        self._use_network_(network, groups_after(self._network_groups, relative, sizes))
        return True

    def restored(self) -> nn.Module:
        """Copy the original network, with the trained weights of the channels that were never removed."""
        restored = deep_copy(self._model)
        trained = cut_tensors(self._tensors(self._network), removed_indices(self._network_groups, self._relative()))
        put_back_(self._tensors(restored), trained, self._groups, self.channels.plan(self.kept))
        return restored

    @torch.no_grad()
    def _remove_weights_(self) -> None:
        """Set the slices of removed channels to zero, with their optimiser state, and leave them out of norms."""
        parameters = dict(self._network.named_parameters())
        removed = {
            key: indices.indices
            for key, indices in removed_indices(self._network_groups, self._relative()).items()
            if key[0] in parameters
        }
        # Onto the device in one copy.
        joined = torch.cat([*removed.values()]).to(next(iter(parameters.values())).device, non_blocking=True)
        by_name: dict[str, dict[int, Tensor]] = {}
        for (name, dim), indices in zip(removed, joined.split([*map(len, removed.values())]), strict=True):
            by_name.setdefault(name, {})[dim] = indices
        for name, along in by_name.items():
            averages = self._co_trained.averages(parameters[name]) if self._co_trained else ()
            for tensor in (parameters[name], *averages):
                for dim, indices in along.items():
                    tensor.index_fill_(dim, indices, 0.0)
        if self._has_norms:
            self._norms = RestrictedNorms(
                [(p, KeptMask(p.shape, by_name.get(name, {}))) for name, p in self._evaluated.named_parameters()]
            )

    def _macs(self, mask: Tensor) -> int:
        """Count the multiply-adds of the network with the channels of a mask."""
        return self._costs.of("macs", {name: int(kept.sum()) for name, kept in self.channels.split(mask).items()})

    def _relative(self) -> Plan:
        """Return the plan that keeps what no mask has removed, numbered as in the network that is present."""
        present = self.channels.split(self._present)
        return Plan.of_masks({name: kept[present[name]] for name, kept in self.channels.split(self.kept).items()})

    def _use_network_(self, network: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        """Mask `network`, whose groups are `groups`, from now on."""
        self._network, self._network_groups = network, tuple(groups)
        self._evaluated = batch_statistics_only(network)
        columns = self._present.nonzero().flatten()
        parameters = dict(self._evaluated.named_parameters())
        self._parameters = [*parameters.values()]
        self._gradients = ChannelGradients(parameters, groups, columns, self.channels.total)
        self._norms = None  # nothing is masked

    @staticmethod
    def _tensors(network: nn.Module) -> Mapping[str, Tensor]:
        return dict(named_state(network))
