"""Gates on the branches of blocks: a factor at the addition with which each branch joins its input.

The gradient of a loss by a gate of 1 says how much the branch matters, as that by a gate on a channel does for the
channel (Molchanov et al., arXiv:1906.10771, eq. 8). A gate of 0 leaves the branch out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.channels.blocks import Block
from passdeploy.models.function_calls import CallKey, FunctionCallTracker
from passdeploy.slimming.masked_branches import ChangedBranches


class BlockGates:
    """Gates of the blocks of a network, shape (blocks,), 1 at first.

    Args:
        blocks: that may be skipped.
        device: of the network.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device) -> None:
        self.values = torch.ones(len(blocks), device=device, requires_grad=True)
        self._set = [1.0] * len(blocks)
        self._branches = branches_of(blocks)
        self._numbers = {key: number for number, key in enumerate(self._branches)}

    def set_(self, values: Sequence[float]) -> None:
        """Set all gates; nothing is copied to the device where none changes."""
        if list(values) != self._set:
            self._set = list(values)
            with torch.no_grad():
                self.values.copy_(torch.tensor(self._set), non_blocking=True)

    @contextmanager
    def on(self, network: nn.Module) -> Iterator[None]:
        """Multiply the branches of `network` by their gates while it runs inside this context."""
        if not self._branches:
            yield
            return
        tracker = FunctionCallTracker()
        with tracker.hooked_into(network), ChangedBranches(tracker, self._branches, self._gated()):
            yield

    def _gated(self) -> Callable[[Tensor, Any, CallKey, bool], Tensor]:
        gates = self.values.unbind()

        def gated(branch: Tensor, _: Any, key: CallKey, is_in_place: bool) -> Tensor:
            gate = gates[self._numbers[key]].to(branch.dtype)
            return branch.mul_(gate) if is_in_place else branch * gate

        return gated


def branches_of(blocks: Sequence[Block]) -> dict[CallKey, int]:
    """Map the addition of every block, in their order, to the number of the summand that is the branch."""
    branches = {}
    for block in blocks:
        assert block.addition is not None, "a block that may be skipped joins its input at an addition"
        branches[block.addition.module, block.addition.call_index] = block.addition.branch
    return branches
