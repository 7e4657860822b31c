"""Masked network of mask learning, slimmed during learning so that later steps cost less.

While the budget shrinks, a removed channel never comes back. Its slices of the weights are set to zero when it is
removed, and as soon as zeros hide a tenth of the network's multiply-adds, the network is slimmed, and with it the
optimiser state of its weights. Slimming is exact: this changes how long a step takes and nothing else.

A removed block fades: its gate falls from one to zero over some steps, in which the rest of the network learns to do
without it, and only then it is cut out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from passdeploy.channels.blocks import presence, tensors_of
from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.models.cloning import deep_copy, named_state
from passdeploy.slimming.fixed_outputs import mask_outputs_
from passdeploy.slimming.masked_norms import KeptMask, RestrictedNorms
from passdeploy.slimming.slim import slim
from passdeploy.slimming.substitutes import groups_left
from passdeploy.slimming.tensors import cut_tensors, groups_after, put_back_, removed_indices
from passdeploy.sparsity.block_gates import BlockGates
from passdeploy.sparsity.flat import FlatChannels, names_in
from passdeploy.sparsity.mask import ChannelGradients, batch_statistics_only
from passdeploy.sparsity.weight_trainer import CoTrainedWeights
from passdeploy.training.saving import named, prefixed

SLACK = 0.1  # share of the network's multiply-adds that masks may hide before they are cut out
_REMOVED_FACTOR = 1e-12  # of the score of a removed channel


class ShrinkingNetwork:
    """Masked network without the channels that masks removed earlier.

    Args:
        model: the trained network; it is left as it was.
        groups: its prunable groups.
        costs: of the groups' widths and of the blocks that may be skipped.
        co_trained: a copy of `model` that is trained with the masks; None: the weights are frozen.
        fade_steps: steps over which the gate of a removed block falls to zero.
        training: run it in training mode (see `batch_statistics_only`).
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        costs: CostModel,
        co_trained: CoTrainedWeights | None,
        *,
        fade_steps: int = 1,
        training: bool = False,
    ) -> None:
        self._training = training
        self._model, self._groups, self._costs, self._co_trained = model, tuple(groups), costs, co_trained
        self.channels, self._fade_steps = FlatChannels.of(groups, costs.blocks), fade_steps
        self._gate_values = dict.fromkeys((presence(block.name) for block in costs.blocks), 1.0)  # of those present
        self._present = torch.ones(self.channels.total, dtype=torch.bool)  # channels that the network has
        self._norms: RestrictedNorms | None = None  # where channels are masked
        self._has_norms = True  # that depend on which channels there are, such as layer norms; unless none is met
        self.kept = self._present.clone()  # those of them that no mask has removed yet; on the CPU
        self._kept_apart = self._present.clone()  # the same, but for what is inside of removed blocks
        self._masked_outputs: list[RemovableHandle] = []  # where a module without weights returns removed channels
        self._use_network_(co_trained.network if co_trained else deep_copy(model), self._groups)

    def demote_removed(self, scores: Tensor, kept: Tensor | None = None) -> Tensor:
        """Copy the scores, on the CPU and (channels,), with those of removed channels far below all others.

        Args:
            scores: of all channels and blocks.
            kept: those that are not removed, boolean, (channels,); None: those that are left now.
        """
        return torch.where(self.kept if kept is None else kept, scores, scores * _REMOVED_FACTOR)

    def without_removed(self, plan: Plan) -> Plan:
        """Copy `plan` without the channels that were removed before."""
        return self.channels.plan(self.channels.mask(plan) & self.kept)

    def run(self, inputs: Tensor) -> Any:
        """Run the masked network on a batch; `channel_gradients` follow from the backward pass after it."""
        return self.run_by(lambda network: network(inputs))

    def run_by(self, call: Callable[[nn.Module], Any]) -> Any:
        """Run the masked network as `call` does, and return what it returns; the rest is as in `run`."""
        for parameter in (*self._parameters, self._gates.values):
            parameter.grad = None
        self._fade_()
        if self._norms is None:
            with self._gates.on(self._evaluated):
                return call(self._evaluated)
        with self._norms, self._gates.on(self._evaluated):
            output = call(self._evaluated)
        if not self._norms.was_used:  # a network without such norms is not watched any more, which takes time
            self._has_norms, self._norms = False, None
        return output

    def channel_gradients(self) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a loss by all masks and by all gates, each (total,); zero for what was removed.

        Called after the backward pass, before the weights are changed. The mask of a block is its gate.
        """
        masks, gates = self._gradients([parameter.grad for parameter in self._gradients.parameters])
        if self._blocks and (of_gates := self._gates.values.grad) is not None:
            places = self._block_places.to(masks.device)
            masks, gates = masks.index_copy(0, places, of_gates), gates.index_copy(0, places, of_gates)
        return masks, gates

    def shrink_(self, plan: Plan) -> bool:
        """Remove all channels that `plan` does not keep; slim the network if that saves enough, and return if it did.

        Called before the forward pass of a step.
        """
        kept = self.channels.mask(plan) & self.kept
        if torch.equal(kept, self.kept):
            return False
        self.kept = kept
        self._kept_apart &= self.channels.mask(plan, with_inside=False)
        left = self._with_fading(kept)
        if self._macs(left) > (1 - SLACK) * self._macs(self._present):
            self._remove_weights_(self._with_fading(self.kept))
            return False
        self._cut_(left)
        return True

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what was removed, the fading gates, buffers and co-trained weights, as tensors and JSON.

        Weights that are frozen follow from what was removed.
        """
        tensors = {
            "kept": self.kept,
            "kept_apart": self._kept_apart,
            "present": self._present,
            "unmasked": self._unmasked,
            **prefixed("buffers", dict(self._evaluated.named_buffers())),
            **prefixed("co_trained", self._co_trained.state_dict() if self._co_trained else {}),
        }
        return tensors, {"gates": self._gate_values, "has_norms": self._has_norms}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned into a network from which nothing was removed."""
        self.kept, self._kept_apart = tensors["kept"].clone(), tensors["kept_apart"].clone()
        self._gate_values, self._has_norms = dict(facts["gates"]), facts["has_norms"]
        if not tensors["present"].all():
            self._cut_(tensors["present"])
        self._remove_weights_(tensors["unmasked"])
        if self._co_trained:
            self._co_trained.load_state_dict(named(tensors, "co_trained"))
        saved = named(tensors, "buffers")
        for name, buffer in self._evaluated.named_buffers():
            buffer.copy_(saved[name])

    def _cut_(self, left: Tensor) -> None:
        """Slim the network to what a mask leaves of it."""
        relative = self._relative(left)
        if self._co_trained:
            self._co_trained.slim_(self._network_groups, relative, self._blocks)
            network = self._co_trained.network
        else:
            network = slim(self._network, self._network_groups, relative, self._blocks)
        groups = groups_left(self._network_groups, relative, self._blocks)
        self._present = left
        self._use_network_(network, groups_after(groups, relative))

    def restored(self) -> nn.Module:
        """Copy the original network, with the trained weights of what was never removed."""
        restored, plan = deep_copy(self._model), self.channels.plan(self.kept)
        removed = removed_indices(self._network_groups, self._relative(self.kept))
        trained, gone = cut_tensors(self._tensors(self._network), removed), tensors_of(self._costs.blocks, plan.skipped)
        tensors = {name: tensor for name, tensor in self._tensors(restored).items() if name not in gone}
        put_back_(tensors, trained, self._groups, plan)
        return restored

    def _fade_(self) -> None:
        """Lower the gates of removed blocks by one step; those of all others stay at one."""
        masks = self.channels.split(self.kept)
        for name, value in self._gate_values.items():
            if value > 0 and not masks[name]:
                self._gate_values[name] = max(0.0, round(value - 1 / self._fade_steps, 6))
        self._gates.set_([self._gate_values[presence(block.name)] for block in self._blocks])

    def _with_fading(self, kept: Tensor) -> Tensor:
        """Copy a mask with the blocks whose gate has not fallen to zero, and what is inside them and still there."""
        copied = kept.clone()
        masks, present = self.channels.split(copied), self.channels.split(self._present & self._kept_apart)
        fading = [block for block in self._blocks if self._gate_values[presence(block.name)] > 0]
        for name in {name for block in fading for name in names_in(block)} & masks.keys():
            masks[name].copy_(present[name])
        for block in fading:
            masks[presence(block.name)].fill_(True)
        return copied

    @torch.no_grad()
    def _remove_weights_(self, left: Tensor) -> None:
        """Set the slices of what a mask removes to zero, with their optimiser state, and leave them out of norms."""
        parameters, relative = dict(self._network.named_parameters()), self._relative(left)
        removed = {
            key: indices.indices
            for key, indices in removed_indices(self._network_groups, relative).items()
            if key[0] in parameters
        }
        if not removed:
            return
        self._unmasked = left
        for handle in self._masked_outputs:
            handle.remove()
        self._masked_outputs = mask_outputs_(self._evaluated, self._network_groups, relative)
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

    def _relative(self, kept: Tensor) -> Plan:
        """Return the plan that keeps what a mask keeps, numbered as in the network that is present."""
        present, masks = self.channels.split(self._present), self.channels.split(kept)
        groups = {group.name: masks[group.name][present[group.name]] for group in self._network_groups}
        skipped = set(self.channels.plan(kept).skipped)
        here = tuple(block.name for block in self._blocks if block.name in skipped)
        return replace(Plan.of_masks(groups), skipped=here)

    def _use_network_(self, network: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        """Mask `network`, whose groups are `groups`, from now on."""
        self._network, self._network_groups = network, tuple(groups)
        self._evaluated = batch_statistics_only(network, training=self._training)
        columns = self._present[: self.channels.channels].nonzero().flatten()
        masks, places = self.channels.split(self._present), self.channels.split(torch.arange(self.channels.total))
        self._blocks = tuple(block for block in self._costs.blocks if masks[presence(block.name)])  # that are present
        self._block_places = torch.cat([places[presence(block.name)] for block in self._blocks] or [columns[:0]])
        parameters = dict(self._evaluated.named_parameters())
        self._parameters = [*parameters.values()]
        self._gradients = ChannelGradients(parameters, groups, columns, self.channels.total)
        self._gates = BlockGates(self._blocks, self._parameters[0].device)
        self._masked_outputs = []
        self._norms, self._unmasked = None, self._present  # nothing is masked: no slices are set to zero

    @staticmethod
    def _tensors(network: nn.Module) -> Mapping[str, Tensor]:
        return dict(named_state(network))
