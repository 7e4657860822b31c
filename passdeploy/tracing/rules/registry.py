"""The `@rule` decorator, which registers a rule for operations by name; see the module of their kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from passdeploy.tracing.op_call import aten
from passdeploy.tracing.tracer import Rule

RULES: dict[Any, Rule] = {}  # operator without its overload (`OpOverloadPacket`) -> rule


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of `torch.ops.aten`, by name; names that this torch lacks are skipped."""

    def register(function: Rule) -> Rule:
        for op in ops:
            if hasattr(aten, op):
                RULES[getattr(aten, op)] = function
        return function

    return register
