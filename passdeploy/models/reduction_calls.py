"""Reductions over channels (means, norms, softmax), identified by the calling module and the order of its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.models.cloning import modules_by_name

CallKey = tuple[str, int]  # the module that was running, and how many statistics it had taken before


class ReductionCallTracker:
    """Which module of a network runs, and how many statistics it has taken."""

    def __init__(self) -> None:
        self.running: list[str] = []  # outermost first
        self._taken: dict[str, int] = {}

    @property
    def module(self) -> str:
        """The innermost that runs; the network itself has no name."""
        return self.running[-1] if self.running else ""

    def next_key(self) -> CallKey:
        """The key of the statistic that is taken now."""
        turn = self._taken.get(self.module, 0)
        self._taken[self.module] = turn + 1
        return self.module, turn

    @contextmanager
    def hooked_into(self, model: nn.Module) -> Iterator[None]:
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


MEAN_FUNCTIONS = {torch.mean, Tensor.mean}


MAX_FUNCTIONS = {torch.softmax, Tensor.softmax, F.softmax, torch.amax, Tensor.amax}


_NORM_FUNCTIONS = {Tensor.norm, torch.norm, torch.linalg.norm, torch.linalg.vector_norm, F.normalize}


REDUCTION_FUNCTIONS = {*MEAN_FUNCTIONS, *MAX_FUNCTIONS, *_NORM_FUNCTIONS, torch.sum, Tensor.sum}
