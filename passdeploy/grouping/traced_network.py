"""A network and its trace, with all that is needed to cut it at random and run the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from passdeploy.channels.groups import ChannelGroup
from passdeploy.grouping.gather import GroupBuilder
from passdeploy.grouping.risk import required_check
from passdeploy.grouping.transcript import operations_of, transcript_of
from passdeploy.models.cloning import ModelCloner
from passdeploy.models.input_sizes import doubled, further_sizes, other_sizes, takes
from passdeploy.runtime.seeds import generator
from passdeploy.tracing.meta_model import MetaMode, MetaModel, to_meta
from passdeploy.tracing.trace import Trace
from passdeploy.tracing.trace_channels import trace_channels


@dataclass(frozen=True, eq=False)
class TracedNetwork:
    """A network, its trace, and cloners and inputs for trial cuts of it."""

    model: nn.Module
    trace: Trace
    cloner: ModelCloner[nn.Module]  # copies with values, to compare outputs
    noise: tuple[Any, ...]  # random inputs of the example's shapes: with zeros many errors would not show
    trial_cloner: ModelCloner[nn.Module]  # copies that trials cut and run, on the meta device if the trace is
    trial_inputs: tuple[Any, ...]  # inputs of these copies

    @classmethod
    def of(cls, model: nn.Module, inputs: Sequence[Any], meta_model: MetaModel, trace: Trace) -> TracedNetwork:
        """Combine a network, an example of its inputs, the meta-device copy of both, and its trace."""
        cloner, noise = meta_model.original_cloner, tuple(tree_map(_noise_like, list(inputs)))
        if trace.is_meta:
            return cls(model, trace, cloner, noise, meta_model.meta_cloner, meta_model.inputs)
        return cls(model, trace, cloner, noise, cloner, noise)

    @cached_property
    def builder(self) -> GroupBuilder:
        """The builder of the network's channel groups."""
        return GroupBuilder(self.trace)

    @cached_property
    def noise_of_other_size(self) -> tuple[Any, ...] | None:
        """Random inputs of another image size and batch size; None if the network runs at the example's sizes only."""
        # One that runs with values is the user's own, which may keep what it computed: a copy runs.
        model = self.trial_cloner.model if self.trace.is_meta else self.trial_cloner.deep_copy()
        for other in other_sizes(self.noise):
            inputs, mode = (tree_map(to_meta, list(other)), MetaMode()) if self.trace.is_meta else (other, None)
            if takes(model, inputs, mode):
                return other
        return None

    @property
    def training_noise(self) -> tuple[Any, ...]:
        """Random inputs for training mode."""
        return tuple(tree_map(_noise_like, list(doubled(self.noise))))

    @cached_property
    def may_train_otherwise(self) -> bool:
        """True if the code may do something else in training mode than its trace shows.

        Batch norms and dropout do not count: they treat every channel alike. Where nothing else differs, which runs by
        shapes alone show, nothing need be compared.
        """
        cloner, inputs = self.trial_cloner, doubled(self.trial_inputs)
        if not self.trace.is_meta or (there := transcript_of(cloner, inputs, training=True)) is None:
            return True
        return there != transcript_of(cloner, inputs)

    @cached_property
    def noise_of_other_paths(self) -> list[tuple[Any, ...]]:
        """Random inputs of other sizes, or of one sample, with each of which the network takes another risky path.

        Empty where the network runs with values: there each would take as long as a forward pass.
        """
        if not self.trace.is_meta:
            return []
        seen, known, found = [self._operations_at(self.noise)], set[Any](), []
        other = [self.noise_of_other_size] if self.noise_of_other_size is not None else []
        for inputs in (*other, *further_sizes(self.noise)):
            operations = self._operations_at(inputs)
            if operations is not None and operations not in seen:
                seen.append(operations)
                risks = self._risks_at(inputs)
                found += [inputs] if risks - known else []
                known |= risks
        return found

    def _operations_at(self, inputs: Sequence[Any]) -> list[str] | None:
        return operations_of(self.trial_cloner, inputs)

    def _risks_at(self, inputs: Sequence[Any]) -> set[Any]:
        """Collect what the trace does not have: operations that must be checked, with their lines, and other groups."""
        trace, meta_inputs = self.trace, tuple(tree_map(to_meta, list(inputs)))
        meta = MetaModel(self.cloner, self.trial_cloner.model, meta_inputs) if trace.is_meta else None
        other = trace_channels(self.model, inputs, meta_model=meta, outputs=trace.outputs)
        known = {(record.op, record.source) for record in trace.op_log}
        new = [record for record in other.op_log if (record.op, record.source) not in known]
        is_risky = bool(new) and bool(required_check(replace(other, op_log=new), self.class_of))
        here, there = (
            tuple((group.name, group.width, group.is_prunable) for group in GroupBuilder(one).gather())
            for one in (trace, other)
        )
        operations = {(record.op, record.source) for record in new} if is_risky else set()
        return operations | ({there} if here != there else set())

    def class_of(self, module: str) -> type[nn.Module]:
        """Return the class of the module with this name."""
        return type(self.model.get_submodule(module))

    def labels_of(self, group: ChannelGroup) -> Tensor:
        """Return one label of each channel of a group, shape (width,)."""
        slot = group.slots[0]
        return self._labels_by_dim[slot.tensor, slot.dim][slot.index[:, 0]]

    @cached_property
    def _labels_by_dim(self) -> dict[tuple[str, int], Tensor]:
        return {(state.tensor, state.dim): state.labels for state in self.trace.state}


def _noise_like(leaf: Any) -> Any:
    """Return random values of the shape of a float tensor, and anything else as it is."""
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        noise = torch.randn(leaf.shape, generator=generator("rehearse", "noise"))
        return noise.to(leaf.device, leaf.dtype)
    return leaf
