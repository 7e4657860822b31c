"""Parameters in place of others: of the same class, with the same attributes."""

from __future__ import annotations

from torch import Tensor, nn


def parameter_like(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Make a parameter of other values; its class, `requires_grad` and what was attached to it are those of `old`.

    Hooks are not copied: they are functions of gradients of the old shape.
    """
    kind = type(old) if issubclass(type(old), nn.Parameter) else nn.Parameter  # the class of a wrapped tensor is not
    new = nn.Parameter(values, old.requires_grad)
    if kind is not nn.Parameter:
        new = values.detach().as_subclass(kind)
        new.requires_grad_(old.requires_grad)
    vars(new).update(vars(old))
    return new
