"""Channels of what modules without weights return, such as a position embedding that is computed from sines.

A slim network cannot have less of such a tensor: its code computes all of it. But the module that returns it can be
wrapped (models/selected_channels.py), and then only some of its channels come out. So whatever a module without
parameters and buffers returns gets labels of its own, as long as no channel of the network is in it already.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from passdeploy.models.selected_channels import SelectedChannels
from passdeploy.tracing.labels import Reason
from passdeploy.tracing.trace import DimLabels, OutputDim, Trace
from passdeploy.tracing.weak_tensors import WeakTensorDict

# (name of the module, its output, whether the output may have been computed from channels) -> another output or None
OnOutput = Callable[[str, Tensor, bool], Tensor | None]


class FixedOutputs:
    """The outputs of the modules without weights of a network, which get labels of their own while it runs.

    Args:
        model: the network.
        labels: of every tensor, by dimension.
        trace: what the labels are recorded in.
        reason: makes a reason for the operation that is running.
    """

    def __init__(
        self, model: nn.Module, labels: WeakTensorDict[DimLabels], trace: Trace, reason: Callable[[str], Reason]
    ) -> None:
        self._modules, self._labels, self._reason = modules_without_weights(model), labels, reason
        self._union_find, self._record = trace.union_find, trace.fixed_outputs
        self._by_module: dict[str, DimLabels] = {}
        self._returned: list[tuple[Tensor, int, DimLabels]] = []  # an output or its copy, its version, the labels

    def following(self) -> AbstractContextManager[None]:
        """Label these outputs inside the context."""
        return following_outputs(self._modules, self._label)

    def _label(self, module: str, output: Tensor, may_be_channels: bool) -> Tensor | None:
        """Give the output of a module without weights labels of its own, unless it has some or is an activation.

        Args:
            module: its name.
            output: what it returns.
            may_be_channels: True if it has the shape of something that the module was given.
        """
        known = self._labels.get(output)
        if known or (known is not None and may_be_channels):
            return None
        first = self._by_module.get(module)
        if first is None:
            sizes = {dim: size for dim, size in enumerate(output.shape) if size > 1}
            vectors = self._union_find.new_labels(sum(sizes.values())).split([*sizes.values()])
            first = self._by_module[module] = dict(zip(sizes, vectors, strict=True))
            self._record += [OutputDim(module, dim, vector) for dim, vector in first.items()]
        labels = {dim: vector for dim, vector in first.items() if output.shape[dim : dim + 1] == vector.shape}
        for dim in first.keys() - labels.keys():
            self._union_find.protect(first[dim], self._reason("the size of this output changes from call to call"))
        copied = contiguous_copy(output)
        self._labels[copied] = labels
        self._returned += [(tensor, tensor._version, labels) for tensor in (output, copied)]
        return copied

    def protect_overwritten(self) -> None:
        """Protect the channels of outputs that the run changed in place: a slim network would change a copy."""
        for output, version, labels in self._returned:
            if output._version != version:
                for vector in labels.values():
                    self._union_find.protect(
                        vector, Reason("the output of a module without weights is changed in place")
                    )
        self._returned.clear()


def modules_without_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Find the modules, by name, that have neither parameters nor buffers, but for those of torch, as activations.

    Of a module that selects channels of another one (`SelectedChannels`) only the outer one counts.
    """
    found: dict[str, nn.Module] = {}
    _search("", model, found, set())
    found.pop("", None)
    return found


def _search(name: str, module: nn.Module, found: dict[str, nn.Module], seen: set[int]) -> bool:
    """Add the modules without weights inside of a module and itself; return whether it is one."""
    if isinstance(module, SelectedChannels):
        found[name] = module
        return True
    seen.add(id(module))
    children = [(key, child) for key, child in module._modules.items() if child is not None]
    without = not module._parameters and not module._buffers
    for key, child in children:
        if id(child) not in seen:
            without &= _search(f"{name}.{key}" if name else key, child, found, seen)
        elif next(child.parameters(), None) is not None or next(child.buffers(), None) is not None:
            without = False
    if without and not type(module).__module__.startswith("torch.nn."):
        found[name] = module
    return without


@contextmanager
def following_outputs(modules: Mapping[str, nn.Module], on_output: OnOutput) -> Iterator[None]:
    """Call `on_output` with every tensor that one of the modules returns, and let it return another one instead."""

    def hook_of(name: str) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
            if type(output) is not Tensor or not output.is_floating_point():
                return None
            given = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            with _disable_current_modes():  # what is done here is no operation of the network
                return on_output(name, output, any(leaf.shape == output.shape for leaf in given))

        return hook

    hooks = [module.register_forward_hook(hook_of(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def contiguous_copy(output: Tensor) -> Tensor:
    """Copy the output of a module without weights, which may have kept it, and return it again or to others.

    It is contiguous, as what is selected from it is: which operations follow depends on that.
    """
    return output.clone(memory_format=torch.contiguous_format)


def copy_outputs_(model: nn.Module, modules: Collection[str]) -> None:
    """Let modules without weights return contiguous copies as in the trace; those that select channels do anyway."""

    def copied(_: nn.Module, __: Any, output: Any) -> Tensor | None:
        with _disable_current_modes():
            return contiguous_copy(output) if type(output) is Tensor else None

    for module in map(model.get_submodule, modules):
        if not isinstance(module, SelectedChannels):
            module.register_forward_hook(copied)
