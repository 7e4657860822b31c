"""Tell calls of torch's functions apart by the calling module and the number of the call.

A masked network restricts some reductions over channels and lets the branches of skipped blocks contribute nothing.
Neither has a name, so both are found again by where they are called from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.models.cloning import modules_by_name

ADDITION_FUNCTIONS = {torch.add, Tensor.add, Tensor.add_}  # the operators call the methods

CallKey = tuple[str, int]  # name of the calling module, and how many such functions it had called before


class FunctionCallTracker:
    """Counter of the calls of some functions, such as reductions, that each module of a running network makes."""

    def __init__(self) -> None:
        self.running: list[str] = []  # names of the modules whose `forward` runs, outermost first
        self._call_counts: dict[str, int] = {}

    @property
    def module(self) -> str:
        """Name of the innermost running module; empty for the network itself."""
        return self.running[-1] if self.running else ""

    def next_key(self) -> CallKey:
        """Count one more call by the running module, and return its key."""
        number = self._call_counts.get(self.module, 0)
        self._call_counts[self.module] = number + 1
        return self.module, number

    @contextmanager
    def hooked_into(self, model: nn.Module, *, with_root: bool = True) -> Iterator[None]:
        """Follow which module runs, by hooks, and count calls from zero.

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
