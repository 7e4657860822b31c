"""passdeploy: prune a trained vision model with PASS, slim it exactly, export it and measure its latency.

The public names are imported when they are first used, so that `passdeploy --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passdeploy.channels.allocation import choose_channels as choose_channels
    from passdeploy.channels.blocks import Block as Block
    from passdeploy.channels.groups import ChannelGroup as ChannelGroup
    from passdeploy.channels.plan import Plan as Plan
    from passdeploy.channels.plan import reconcile as reconcile
    from passdeploy.commands.prune import run as run
    from passdeploy.export import export_onnx as export_onnx
    from passdeploy.grouping.find import find_blocks as find_blocks
    from passdeploy.grouping.find import find_groups as find_groups
    from passdeploy.runs.load import load as load
    from passdeploy.runtime.versions import __version__ as __version__
    from passdeploy.slimming.masked import masked as masked
    from passdeploy.slimming.slim import slim as slim
    from passdeploy.slimming.verify import verify as verify
    from passdeploy.sparsity.batch_loss import BatchLoss as BatchLoss
    from passdeploy.sparsity.learn import learn_masks as learn_masks
    from passdeploy.tracing.counts import Counts as Counts
    from passdeploy.tracing.counts import count as count
    from passdeploy.trainers.prune import Pruned as Pruned
    from passdeploy.trainers.prune import prune as prune
    from passdeploy.trainers.slim_file import rebuild as rebuild

_MODULE_OF = {
    "BatchLoss": "passdeploy.sparsity.batch_loss",
    "Block": "passdeploy.channels.blocks",
    "ChannelGroup": "passdeploy.channels.groups",
    "Counts": "passdeploy.tracing.counts",
    "Plan": "passdeploy.channels.plan",
    "Pruned": "passdeploy.trainers.prune",
    "__version__": "passdeploy.runtime.versions",
    "choose_channels": "passdeploy.channels.allocation",
    "count": "passdeploy.tracing.counts",
    "export_onnx": "passdeploy.export",
    "find_blocks": "passdeploy.grouping.find",
    "find_groups": "passdeploy.grouping.find",
    "learn_masks": "passdeploy.sparsity.learn",
    "load": "passdeploy.runs.load",
    "masked": "passdeploy.slimming.masked",
    "prune": "passdeploy.trainers.prune",
    "rebuild": "passdeploy.trainers.slim_file",
    "reconcile": "passdeploy.channels.plan",
    "run": "passdeploy.commands.prune",
    "slim": "passdeploy.slimming.slim",
    "verify": "passdeploy.slimming.verify",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
