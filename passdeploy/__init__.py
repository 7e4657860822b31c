"""passdeploy: from a trained vision model to a small, fast, checked engine.

The public names; each is imported when it is first used, so that `passdeploy --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passdeploy.channels.groups import ChannelGroup as ChannelGroup
    from passdeploy.channels.mapping import find_groups as find_groups
    from passdeploy.counts import Counts as Counts
    from passdeploy.counts import count as count
    from passdeploy.deploy import load as load
    from passdeploy.export import export_onnx as export_onnx
    from passdeploy.pipeline import run as run
    from passdeploy.plan import Plan as Plan
    from passdeploy.plan import choose_channels as choose_channels
    from passdeploy.plan import reconcile as reconcile
    from passdeploy.slimming import masked as masked
    from passdeploy.slimming import slim as slim
    from passdeploy.slimming import verify as verify
    from passdeploy.sparsity.learn import learn_masks as learn_masks

__version__ = "0.1.0"

_HOME = {
    "ChannelGroup": "passdeploy.channels.groups",
    "find_groups": "passdeploy.channels.mapping",
    "Counts": "passdeploy.counts",
    "count": "passdeploy.counts",
    "export_onnx": "passdeploy.export",
    "learn_masks": "passdeploy.sparsity.learn",
    "load": "passdeploy.deploy",
    "run": "passdeploy.pipeline",
    "Plan": "passdeploy.plan",
    "choose_channels": "passdeploy.plan",
    "reconcile": "passdeploy.plan",
    "masked": "passdeploy.slimming",
    "slim": "passdeploy.slimming",
    "verify": "passdeploy.slimming",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
