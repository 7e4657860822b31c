"""Tell reductions over channels (means, norms, softmax) apart by calling module and number of the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.models.cloning import modules_by_name

# Functions that reduce over channels: without one channel, their result changes for all others.
MEAN_FUNCTIONS = {torch.mean, Tensor.mean}
MAX_FUNCTIONS = {torch.softmax, Tensor.softmax, F.softmax, torch.amax, Tensor.amax}  # -inf leaves a channel out
_NORM_FUNCTIONS = {Tensor.norm, torch.norm, torch.linalg.norm, torch.linalg.vector_norm, F.normalize}
REDUCTION_FUNCTIONS = {*MEAN_FUNCTIONS, *MAX_FUNCTIONS, *_NORM_FUNCTIONS, torch.sum, Tensor.sum}

CallKey = tuple[str, int]  # name of the calling module, and how many reductions it had called before


class ReductionCallTracker:
    """Counter of the reductions that each module of a running network calls."""

    def __init__(self) -> None:
        self.running: list[str] = []  # names of the modules whose `forward` runs, outermost first
        self._call_counts: dict[str, int] = {}

    @property
    def module(self) -> str:
        """Name of the innermost running module; empty for the network itself."""
        return self.running[-1] if self.running else ""

    def next_key(self) -> CallKey:
        """Count one more reduction of the running module, and return its key."""
        number = self._call_counts.get(self.module, 0)
        self._call_counts[self.module] = number + 1
        return self.module, number

    @contextmanager
    def hooked_into(self, model: nn.Module, *, with_root: bool = True) -> Iterator[None]:
        """Follow which module runs, by hooks, and count reductions from zero.

        Args:
            model: the network.
            with_root: list the network itself in `running`, under the name "". False where its forward pass has begun.
        """

        def enter(name: str) -> Callable[..., None]:
            return lambda *_: self.running.append(name)

        def leave(*_: Any) -> None:
            self.running.pop()

        self._call_counts = {}
        hooks = []
        for name, module in modules_by_name(model):
            if name or with_root:
                hooks.append(module.register_forward_pre_hook(enter(name)))
                hooks.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
