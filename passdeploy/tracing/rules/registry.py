"""Where rules register for operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from passdeploy.tracing.tracer import Rule

aten = torch.ops.aten
RULES: dict[Any, Rule] = {}  # operation, without its overload -> rule


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of `torch.ops.aten`, by name; names this torch lacks are passed over."""

    def register(function: Rule) -> Rule:
        for op in ops:
            if hasattr(aten, op):
                RULES[getattr(aten, op)] = function
        return function

    return register
