"""Layers that no pass has reached, such as experts that images of another kind are sent to.

Their weights have met no channels, so they would stay whole, and fail on the first image that reaches them.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from passdeploy.tracing.labels import Reason
from passdeploy.tracing.trace import Trace


def idle_layers(model: nn.Module, used: Collection[str]) -> tuple[str, ...]:
    """List the modules with parameters of their own, none of which was used.

    Args:
        model: the network.
        used: names of the parameters that were used.
    """
    ran = {id(parameter) for name, parameter in model.named_parameters() if name in used}
    own = ((name, [id(one) for one in module.parameters(recurse=False)]) for name, module in model.named_modules())
    return tuple(name for name, parameters in own if parameters and ran.isdisjoint(parameters))


def protect_twins_of_idle_(model: nn.Module, trace: Trace, used: Collection[str]) -> None:
    """Protect the channels of layers in whose place others may run that have not run yet.

    These are entries of the same list or dictionary of modules, with parameters of the same shapes.

    Args:
        model: the network.
        trace: of it.
        used: names of the parameters that were used.
    """
    for name, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList | nn.ModuleDict):
            continue
        ran, idle = dict[str, list[torch.Size]](), dict[str, list[torch.Size]]()
        for key, child in modules.named_children():
            prefix = f"{name}.{key}" if name else key
            shapes = {f"{prefix}.{own}": parameter.shape for own, parameter in child.named_parameters()}
            if shapes:
                (idle if shapes.keys().isdisjoint(used) else ran)[prefix] = list(shapes.values())
        for layer, shapes_of_layer in ran.items():
            twin = next((one for one, others in idle.items() if others == shapes_of_layer), None)
            for state in trace.state if twin else ():
                if state.tensor.startswith(f"{layer}."):
                    trace.union_find.protect(state.labels, Reason(f"{twin}, which did not run, may run in its place"))


def protect_widths_of_idle_(model: nn.Module, trace: Trace) -> None:
    """Protect the outputs of layers that are as wide as a layer which did not run reads.

    Where the code branches on values, that layer may read them for other images.
    """
    idle = [model.get_submodule(name) for name in trace.idle_layers]
    widths = {weight.size(1) * getattr(module, "groups", 1) for module in idle for weight in _weights_of(module)}
    for vector in trace.output_labels:
        if len(vector) in widths:
            trace.union_find.protect(vector, Reason("a layer that did not run may read as many channels"))


def _weights_of(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]
