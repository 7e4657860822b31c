"""Branches of skipped blocks that contribute nothing: where a branch is added to its input, zeros take its place.

The network runs all of its own modules. The addition is found by the module that calls it and the number of the call,
so nothing here depends on which modules a slim network drops, or on what it has in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from passdeploy.channels.blocks import Addition, Block, skipped_blocks
from passdeploy.channels.plan import Plan
from passdeploy.models.function_calls import ADDITION_FUNCTIONS, CallKey, FunctionCallTracker

_SUMMANDS = ("input", "other")


class ChangedBranches(TorchFunctionMode):
    """Mode in which the branch of each given addition is changed.

    Args:
        tracker: of the network that runs.
        branches: addition -> which of its summands is the branch, 0 or 1.
        change: (branch, what it is added to, addition, whether the sum is written into the branch) -> what is added
            instead; in the last case the branch itself must be changed.
    """

    def __init__(
        self,
        tracker: FunctionCallTracker,
        branches: Mapping[CallKey, int],
        change: Callable[[Tensor, Any, CallKey, bool], Tensor],
    ) -> None:
        super().__init__()
        self._tracker, self._branches, self._change = tracker, branches, change

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call any function of torch, with another branch where it is known."""
        given = dict(kwargs or {})
        key = self._tracker.next_key() if func in ADDITION_FUNCTIONS else None
        branch = None if key is None else self._branches.get(key)
        if key is None or branch is None:
            return func(*args, **given)
        summands = [*args[:2], *(given.pop(name) for name in _SUMMANDS[len(args[:2]) :])]
        is_in_place = func is Tensor.add_ and branch == 0
        summands[branch] = self._change(summands[branch], summands[1 - branch], key, is_in_place)
        return func(*summands, *args[2:], **given)


def _mute(branch: Tensor, _: Any, __: CallKey, is_in_place: bool) -> Tensor:
    return branch.zero_() if is_in_place else torch.zeros_like(branch)  # a product with zero keeps what is not finite


def additions_of(plan: Plan, blocks: Sequence[Block]) -> list[Addition]:
    """List the additions at which the blocks that a plan skips join their input."""
    return [block.addition for block in skipped_blocks(blocks, plan.skipped) if block.addition is not None]


def mute_branches_(model: nn.Module, additions: Iterable[Addition]) -> None:
    """Let the branches of these additions contribute nothing whenever `model` is called; its class stays what it is."""
    if muting := _Muting(additions):
        model.register_forward_pre_hook(muting.enter, prepend=True)
        model.register_forward_hook(muting.leave, always_call=True)


@contextmanager
def muted_branches(model: nn.Module, additions: Iterable[Addition]) -> Iterator[None]:
    """Let the branches of these additions contribute nothing inside of this context."""
    muting = _Muting(additions)
    hooks = [
        model.register_forward_pre_hook(muting.enter, prepend=True),
        model.register_forward_hook(muting.leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Muting:
    """Hooks that mute branches while a network runs."""

    def __init__(self, additions: Iterable[Addition]) -> None:
        self._branches = {(one.module, one.call_index): one.branch for one in additions}
        self._entered: list[ExitStack] = []

    def __bool__(self) -> bool:
        return bool(self._branches)

    def enter(self, model: nn.Module, _: Any) -> None:
        """Enter the mode before the forward pass."""
        tracker, stack = FunctionCallTracker(), ExitStack()
        stack.enter_context(tracker.hooked_into(model, with_root=False))
        stack.enter_context(ChangedBranches(tracker, self._branches, _mute))
        self._entered.append(stack)

    def leave(self, *_: Any) -> None:
        """Leave it afterwards, also where the pass failed."""
        if self._entered:
            self._entered.pop().close()
