"""Wrappers around networks (torch.compile, DataParallel, averaged models): unwrapped, or refused with the reason.

Groups, plans and slim networks belong to the plain `nn.Module` inside a wrapper: its parameter names are those of a
state dict saved without the wrapper.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from passdeploy.errors import ModelError

COMPILED_CALL = "_compiled_call_impl"  # set by `nn.Module.compile`; it runs the module that it was made of


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside of wrappers; any other network as it is.

    Raises:
        ModelError: a part of the network cannot be followed or copied: TorchScript, a wrapper inside of the network,
            parameters that are sharded or have no size yet.
    """
    while (attribute := _attribute_of_wrapped(model)) is not None:
        model = getattr(model, attribute)
    _require_plain(model)
    return model


def _attribute_of_wrapped(module: nn.Module) -> str | None:
    """Name of the attribute in which a wrapper holds its network; None for anything but a wrapper."""
    if "_orig_mod" in module._modules and "dynamo_ctx" in vars(module):  # OptimizedModule, of a private module of torch
        return "_orig_mod"
    return "module" if isinstance(module, DataParallel | DistributedDataParallel | AveragedModel) else None


def _require_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        shown = f"{name!r} of the network" if name else "the network"
        if isinstance(module, ScriptModule):
            raise ModelError(
                f"{shown} is TorchScript ({type(module).__name__}), whose code cannot be followed or cut.\n"
                "Pass the nn.Module that it was made from, and script the slim network."
            )
        if name and (attribute := _attribute_of_wrapped(module)) is not None:
            raise ModelError(
                f"{shown} is wrapped in {type(module).__name__}, which would go on running the layers inside it.\n"
                f"Put the module itself there ({name}.{attribute}), and wrap the slim network."
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ModelError(
                f"{shown} is sharded over processes (FullyShardedDataParallel), so no layer is here as a whole.\n"
                "Load its full state dict into the plain network."
            )
        for parameter_name, parameter in module.named_parameters(recurse=False):
            _require_whole(f"{name}.{parameter_name}" if name else parameter_name, parameter)


def _require_whole(name: str, parameter: Any) -> None:
    if is_lazy(parameter):
        raise ModelError(
            f"{name} has no size yet: it belongs to a lazy layer.\nRun the network once on an example batch first."
        )
    if type(parameter).__name__ == "DTensor":  # importing the class would import all of torch.distributed.tensor
        raise ModelError(
            f"{name} is sharded over processes (DTensor), so it is not here as a whole.\n"
            "Load the full state dict into the plain network."
        )


@contextmanager
def calling_eagerly(model: nn.Module) -> Iterator[None]:
    """Call the modules themselves, not what `nn.Module.compile` made of them."""
    compiled = [(module, vars(module)[COMPILED_CALL]) for module in model.modules() if COMPILED_CALL in vars(module)]
    for module, _ in compiled:
        object.__setattr__(module, COMPILED_CALL, None)
    try:
        yield
    finally:
        for module, call in compiled:
            object.__setattr__(module, COMPILED_CALL, call)
