"""Structure of a network as far as its latency depends on it, hashed to tell whether a latency table is of a network.

A table in the cache is of exactly the operators that the network runs. A file with a table goes to another machine,
where PyTorch may run other operators and the data may have other classes, so it is known by the modules that are
called: their classes and all that they state besides widths. The widths are in the table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passdeploy.channels.groups import ChannelMap
from passdeploy.errors import PlanError
from passdeploy.latency.table import LatencyTable
from passdeploy.models.cloning import deep_copy
from passdeploy.tracing.dispatch_mode import UncompiledMode

# What a layer with weights states besides its widths.
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "num_heads")
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def require_same_network(table: LatencyTable, model: nn.Module, channels: ChannelMap, image: Tensor) -> None:
    """Check that a table is of a network, or of one that differs in its classes or in the layers that may be cut.

    Widths are compared where the table becomes a cost, see `with_latency`.

    Raises:
        PlanError: it is of another network, or has not followed a group that may be cut.
    """
    if table.modules and table.modules != hash_modules(model, image):
        raise PlanError(
            "the latency table is of a network with other layers than this one.\n"
            "Make one of this network: passdeploy profile --table"
        )
    if missing := [group.name for group in channels.prunable if group.name not in table.widths]:
        raise PlanError(
            f"the latency table does not follow group {missing[0]!r}, which can be cut in this network.\n"
            "It was made for another model, or with more layers excluded."
        )


def hash_operators(model: nn.Module, image: Tensor) -> str:
    """Hash the operators of a forward pass on the CPU, with their options and the shapes of what they read."""
    network, recorder = deep_copy(model).cpu().eval(), _OperatorRecorder()
    with torch.no_grad(), recorder:
        network(image)
    return _hash_lines(recorder.calls)


def hash_modules(model: nn.Module, image: Tensor) -> str:
    """Hash the modules that a forward pass calls, in their order, without the widths of their weights."""
    network, calls = deep_copy(model).cpu().eval(), list[str]()
    for name, module in network.named_modules():
        module.register_forward_hook(lambda module, *_, name=name: calls.append(f"{name} {_describe(module)}"))
    with torch.no_grad():
        network(image)
    return _hash_lines(calls)


class _OperatorRecorder(UncompiledMode):
    """Dispatch mode that writes down every operator: its name, the shapes of its tensors, and its other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(f"{func} {[_plain(leaf) for leaf in tree_leaves((args, kwargs))]}")
        return func(*args, **(kwargs or {}))


def _plain(value: Any) -> str:
    """Describe an argument by what is the same in every process."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return repr(value) if isinstance(value, _PLAIN) else type(value).__name__


def _describe(module: nn.Module) -> str:
    """Describe a module by its class and its settings, of a layer with weights without their sizes."""
    if next(module.parameters(recurse=False), None) is None:
        return f"{type(module).__name__} {module.extra_repr()}"
    return f"{type(module).__name__} {[getattr(module, name, None) for name in _GEOMETRY]}"


def _hash_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
