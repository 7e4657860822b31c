"""Slimming of a network by torch-pruning."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.slimming_common import SHARE, Report, timed, uncut_layers
from benchmarks.zoo import Entry


def _prune_(network: nn.Module, example: Tensor, kept: Sequence[nn.Module], **options: Any) -> None:
    """Cut `SHARE` of all layers except `kept` with torch-pruning."""
    import torch_pruning as tp

    pruner = tp.pruner.MetaPruner(
        network,
        example,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=SHARE,
        ignored_layers=list(kept),
        **options,
    )
    pruner.step()


def measure_torch_pruning(entry: Entry, report: Report) -> None:
    """Cut the same share of the same network with torch-pruning."""

    model, inputs = entry.build(), entry.inputs()
    if entry.zoo == "detection":  # its tracer takes tensors only: the backbone
        model, inputs = model.backbone, (inputs[0][0][None],)
    with torch.no_grad():
        shapes = [leaf.shape for leaf in tree_leaves(model(*inputs))]
    params = sum(parameter.numel() for parameter in model.parameters())
    last = [
        module
        for module in model.modules()
        if getattr(module, "out_features", getattr(module, "out_channels", None)) == entry.classes
    ]
    report({"phase": "slim"})

    names = [name for name, module in model.named_modules() if any(module is one for one in last)]

    def cut(network: nn.Module) -> nn.Module:
        _prune_(network, inputs[0], [network.get_submodule(name) for name in names], global_pruning=False)
        return network

    model, slim_s = timed(cut, partial(deepcopy, model))
    report({"slim_s": slim_s, "phase": "compare"})
    with torch.no_grad():
        new_shapes = [leaf.shape for leaf in tree_leaves(model(*inputs))]
    left = sum(parameter.numel() for parameter in model.parameters())
    if new_shapes != shapes:
        raise ValueError(f"output shapes {[tuple(s) for s in new_shapes][:3]} were {[tuple(s) for s in shapes][:3]}")
    report({"params_kept": left / params, "status": "ok" if left < params else "nothing cut"})


def measure_rounding_torch_pruning(entry: Entry, report: Report) -> None:
    """Count the layers that stay whole when torch-pruning rounds widths to multiples of 8."""

    model, inputs = entry.build(), entry.inputs()
    dense = deepcopy(model)
    last = [module for module in model.modules() if getattr(module, "out_features", None) == entry.classes]
    report({"phase": "slim"})
    _prune_(model, inputs[0], last, round_to=8)
    layers, uncut = uncut_layers(dense, model, None)
    report({"layers": layers, "uncut": uncut, "status": "ok"})
