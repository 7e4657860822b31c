"""Classifier layer of a network: finding it, and replacing it with one for another number of classes."""

from __future__ import annotations

from torch import nn

from passdeploy.errors import ModelError


def find_classifier(model: nn.Module, num_classes: int) -> str | None:
    """Find the last linear layer or 1x1 convolution with `num_classes` outputs; return its name, or None."""
    found = None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            width = module.out_features
        elif isinstance(module, nn.Conv2d) and module.kernel_size == module.stride == (1, 1):
            width = module.out_channels
        else:
            continue
        found = name if width == num_classes else found
    return found


def classifier_of(model: nn.Module, num_classes: int) -> str:
    """Find the classifier layer, and return its name.

    Raises:
        ModelError: no layer has `num_classes` outputs.
    """
    name = find_classifier(model, num_classes)
    if not name:
        raise ModelError(f"found no final classifier of {num_classes} classes that a new one could replace.")
    return name


def replace_classifier_(model: nn.Module, *, old_classes: int, num_classes: int) -> None:
    """Replace the final classifier with a new, randomly initialised one.

    Raises:
        ModelError: no layer has `old_classes` outputs.
    """
    name = classifier_of(model, old_classes)
    old = model.get_submodule(name)
    has_bias = old.bias is not None
    new: nn.Module
    if isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1, bias=has_bias)
    else:
        assert isinstance(old, nn.Linear)
        new = nn.Linear(old.in_features, num_classes, bias=has_bias)
    model.set_submodule(name, new)
