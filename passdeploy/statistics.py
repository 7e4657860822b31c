"""Statistics over channels, of those that exist.

A mean, a sum, a norm, a maximum or a softmax over channels of which some are removed is, in the masked network, that of
the others: that is what the slim network will compute. Such a call has no scale by which it could be known, as norms
have (norms.py); it is known by the module that makes it, and by how many of them the module made before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from passdeploy.cloning import modules_by_name

CallKey = tuple[str, int]  # the module that was running, and how many statistics it had taken before
Existing = tuple[int, Tensor]  # a dimension counted from the last, and True for each of its places that exists


class Turns:
    """Which module of a network runs, and how many statistics it has taken."""

    def __init__(self) -> None:
        self.running: list[str] = []  # outermost first
        self._taken: dict[str, int] = {}

    @property
    def module(self) -> str:
        """The innermost that runs; the network itself has no name."""
        return self.running[-1] if self.running else ""

    def next(self) -> CallKey:
        """The key of the statistic that is taken now."""
        turn = self._taken.get(self.module, 0)
        self._taken[self.module] = turn + 1
        return self.module, turn

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Keep up with what runs; statistics are counted anew."""

        def enter(name: str) -> Callable[..., None]:
            return lambda *_: self.running.append(name)

        def leave(*_: Any) -> None:
            self.running.pop()

        self._taken = {}
        hooks = []
        for name, module in modules_by_name(model):
            hooks.append(module.register_forward_pre_hook(enter(name)))
            hooks.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class RestrictedStatistics(TorchFunctionMode):
    """While active, statistics that are known see only what exists.

    Args:
        turns: follows the network that runs.
        existing: which statistics, and over which channels they go.
    """

    def __init__(self, turns: Turns, existing: Mapping[CallKey, Sequence[Existing]]) -> None:
        super().__init__()
        self._turns, self._existing = turns, existing

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Any function of torch, on its way."""
        known = self._existing.get(self._turns.next()) if func in STATISTICS else None
        if known is None:
            return func(*args, **(kwargs or {}))
        given = dict(kwargs or {})
        x = args[0] if args else given.pop("input")
        for dim, exists in known:
            gone = ~exists.to(x.device).view(-1, *[1] * (-1 - dim))
            x = x.masked_fill(gone, -torch.inf if func in _LARGEST else 0.0)
        found = func(x, *args[1:], **given)
        if func in _MEANS:  # of as many as there were: the others count for nothing
            for _, exists in known:
                found = found * (exists.numel() / int(exists.sum()))
        return found


_MEANS = {torch.mean, Tensor.mean}
_LARGEST = {torch.softmax, Tensor.softmax, F.softmax, torch.amax, Tensor.amax}
_NORMS = {Tensor.norm, torch.norm, torch.linalg.norm, torch.linalg.vector_norm, F.normalize}
STATISTICS = {*_MEANS, *_LARGEST, *_NORMS, torch.sum, Tensor.sum}
