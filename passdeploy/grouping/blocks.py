"""The blocks of a network: its residual branches, what takes the place of each, and whether that is exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from passdeploy.channels.blocks import Addition, Block, Replacement, is_inside
from passdeploy.channels.groups import ChannelGroup
from passdeploy.grouping.block_trials import BlockTrials
from passdeploy.grouping.branch_removal import BranchRemover
from passdeploy.grouping.residual_branches import Branch, BranchFinder
from passdeploy.grouping.traced_network import TracedNetwork
from passdeploy.models.cloning import named_plain_tensors, named_state
from passdeploy.tracing.dataflow import DataFlow, record_dataflow


def blocks_of(network: TracedNetwork, groups: Sequence[ChannelGroup]) -> tuple[Block, ...]:
    """Find the blocks of a network, in the order of the forward pass.

    Args:
        network: the network.
        groups: its channel groups, which trials cut together with blocks.
    """
    trace = network.trace
    flow = record_dataflow(
        network.trial_cloner.model, network.trial_inputs, is_meta=trace.is_meta, outputs=trace.outputs
    )
    finder = BranchFinder(flow)
    remover = BranchRemover(network.model, flow, finder)
    branches = list(finder.branches())
    removals = [branch.reason or remover.replacements(branch) for branch in branches]
    names = _names(network.model, flow, branches, removals)
    found = list(zip(names, branches, removals, strict=True))
    going = {
        branch: _tensors_inside(network.model, removal) for _, branch, removal in found if not isinstance(removal, str)
    }
    blocks = []
    for name, branch, removal in found:
        joining = flow.ops[branch.joining]
        if isinstance(removal, str):
            blocks.append(Block(name, removal, joining.source))
            continue
        assert joining.addition is not None, "a branch whose addition cannot be found again has a reason to stay"
        blocks.append(
            Block(
                name,
                source=joining.source,
                addition=Addition(*joining.addition, branch.side),
                replacements=removal,
                tensors=going[branch],
                contains=tuple(other for other, inner, _ in found if inner.joining in branch.region),
                chains=remover.chains(branch, going),
            )
        )
    return BlockTrials(network, groups, blocks).checked()


def _names(
    model: nn.Module, flow: DataFlow, branches: Sequence[Branch], removals: Sequence[str | tuple[Replacement, ...]]
) -> list[str]:
    """Name each block after the module that goes, of several the one with the most parameters, or else its owner."""
    names: list[str] = []
    counts = Counter[str]()
    for branch, found in zip(branches, removals, strict=True):
        if isinstance(found, str):
            name = flow.calls[flow.ops[branch.joining].calls[-1]].name or "the network"
        else:
            name = max((one.module for one in found), key=lambda module: _parameters_in(model, module))
        counts[name] += 1
        names.append(name if counts[name] == 1 else f"{name}[{counts[name]}]")
    return names


def _parameters_in(model: nn.Module, module: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(module).parameters())


def _tensors_inside(model: nn.Module, replacements: Sequence[Replacement]) -> tuple[str, ...]:
    """Name the parameters, buffers and plain tensors of the modules that are replaced."""
    modules = [one.module for one in replacements]
    return tuple(
        name
        for name, _ in (*named_state(model), *named_plain_tensors(model))
        if any(is_inside(name.rpartition(".")[0], module) for module in modules)
    )
