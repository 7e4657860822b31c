"""Stand-in, in a slim network, for a module without weights whose output loses channels.

A position embedding that is computed from sines has nothing to cut. The module goes on computing all of its channels,
and those that stay are selected from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.models.cloning import modules_by_name

_INDEX_NAME = re.compile(r"(?:(?P<module>.+)\.)?kept_of_(?P<size>\d+)_along_(?P<dim>\d+)")


class SelectedChannels(nn.Module):
    """A module of which some channels of the output stay.

    The indices are buffers whose names say how many channels there were and along which dimension, such as
    `kept_of_256_along_1`, so that a state dict says all that a rebuild needs.

    Args:
        whole: the module that computes all channels; it returns a tensor.
    """

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole
        self.selections: tuple[tuple[str, int, int], ...] = ()  # name of the buffer, dimension, channels before

    def select_(self, dim: int, size: int, index: Tensor) -> None:
        """Keep only these of the channels that are left along a dimension.

        Args:
            dim: the dimension.
            size: channels along it that are left.
            index: those of them that stay.
        """
        name = next((name for name, along, _ in self.selections if along == dim), "")
        if name:
            before = self.get_buffer(name)
            self.register_buffer(name, before[index.to(before.device)])
            return
        name = f"kept_of_{size}_along_{dim}"
        self.selections = (*self.selections, (name, dim, size))
        self.register_buffer(name, index)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute all channels and select those that stay."""
        output: Tensor = self.whole(*args, **kwargs)
        for name, dim, size in self.selections:
            if output.size(dim) != size:
                raise RuntimeError(
                    f"{type(self.whole).__name__} put out {output.size(dim)} channels along dimension {dim}, and some "
                    f"of {size} are to be selected"
                )
            output = output.index_select(dim, self.get_buffer(name))
        return output

    def kept_along(self, dim: int) -> Tensor | None:
        """Return the indices that stay along a dimension; None if all do."""
        return next((self.get_buffer(name) for name, along, _ in self.selections if along == dim), None)

    def extra_repr(self) -> str:
        """Show how many channels stay."""
        return ", ".join(f"{len(self.get_buffer(name))} of {size} along {dim}" for name, dim, size in self.selections)


def is_index_name(name: str) -> bool:
    """Test whether a name in a state dict is that of the indices which a `SelectedChannels` keeps."""
    return _INDEX_NAME.fullmatch(name) is not None


def indices_in(model: nn.Module) -> frozenset[int]:
    """Return the ids of the indices of every `SelectedChannels` of a network."""
    return frozenset(
        id(index)
        for _, module in modules_by_name(model)
        if isinstance(module, SelectedChannels)
        for index in module._buffers.values()
    )


def select_channels_(model: nn.Module, module: str, dim: int, size: int, index: Tensor) -> None:
    """Let a module without weights put out only some channels, under every name that it has in `model`.

    Args:
        model: the network.
        module: name of the module in it.
        dim: dimension of its output.
        size: channels along it that are left.
        index: those of them that stay.
    """
    old = model.get_submodule(module)
    if not isinstance(old, SelectedChannels):
        selected = SelectedChannels(old).train(old.training)
        for parent in [parent for _, parent in modules_by_name(model) if parent is not selected]:
            named = [name for name, child in parent._modules.items() if child is old]
            parent._modules.update(dict.fromkeys(named, selected))
        old = selected
    old.select_(dim, size, index)


def select_channels_named_(model: nn.Module, names: Iterable[str]) -> None:
    """Make room for the indices of a slim network's state dict, whose values are loaded later.

    Args:
        model: the dense network, or one in which this was done before.
        names: of the tensors in the state dict; those that are no such indices are passed over.
    """
    for name in names:
        if (found := _INDEX_NAME.fullmatch(name)) is None:
            continue
        try:
            module = model.get_submodule(found["module"] or "")
        except AttributeError:
            continue  # the names are of another network, which whoever loads them will find out
        if not hasattr(module, name.rpartition(".")[2]):
            nothing = torch.zeros(0, dtype=torch.int64, device=next(model.parameters()).device)
            select_channels_(model, found["module"], int(found["dim"]), int(found["size"]), nothing)
