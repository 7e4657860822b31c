"""Search the code of a network for places that ask which mode it is in, and may do something else in training mode."""

from __future__ import annotations

from types import CodeType

from torch import nn

from passdeploy.grouping.width_branches import functions_of
from passdeploy.models.modes import drops_at_random


def asks_for_training_mode(model: nn.Module) -> bool:
    """True if code of the network, other than torch's own and that of dropout, asks which mode it is in."""
    modules = (module for module in model.modules() if not drops_at_random(module))
    return any(_reads_mode(function.__code__) for function in {one for each in modules for one in functions_of(each)})


def _reads_mode(code: CodeType) -> bool:
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return "training" in code.co_names or any(map(_reads_mode, nested))
