"""Positional arguments of a network, from what users give as its example inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from passdeploy.errors import UsageError


def positional(inputs: Tensor | Sequence[Any]) -> tuple[Any, ...]:
    """Return the positional arguments of a network: a tensor alone is the only one.

    Raises:
        UsageError: the inputs are neither a tensor nor a list or tuple, such as a dictionary of named arguments.
    """
    if isinstance(inputs, Tensor):
        return (inputs,)
    if isinstance(inputs, list | tuple):
        return tuple(inputs)
    advice = "Give a tensor, or a list of positional arguments"
    if isinstance(inputs, dict):
        advice += "; for named ones write a module whose forward passes them on by name"
    raise UsageError(f"example inputs cannot be of type {type(inputs).__name__}.\n{advice}.")
