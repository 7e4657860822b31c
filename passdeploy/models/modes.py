"""Contexts to run a network in: evaluation or training mode, attention and recurrent layers without fused kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from passdeploy.models.cloning import modules_by_name


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Run `nn.MultiheadAttention` operation by operation instead of as one fused kernel that hides its channels."""
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)


@contextmanager
def unfused_rnns() -> Iterator[None]:
    """Run recurrent networks operation by operation instead of as one kernel of oneDNN or cuDNN."""
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave `torch.inference_mode` in a block or a decorated function; gradients stay off.

    In it torch runs composite operations as a whole, which no rule knows, and makes tensors that cannot be trained.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _set_training(module: nn.Module, training: bool) -> None:
    """Do what `module.train(training)` does, faster: it skips `nn.Module.__setattr__`, which searches all tables.

    A module that overrides `train` has its own method called, which then decides about the modules inside.
    """
    if _overrides_train(module):
        module.train(training)
        return
    object.__setattr__(module, "training", training)
    for child in module.children():
        _set_training(child, training)


def _overrides_train(module: nn.Module) -> bool:
    return type(module).train is not nn.Module.train or "train" in vars(module)


@contextmanager
def evaluating(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Put every module into evaluation mode, or training mode; afterwards each gets its former mode back.

    A module that overrides `train`, such as one that merges weights for evaluation, is told of both changes.
    """
    before = [(module, module.training) for _, module in modules_by_name(model)]
    _set_training(model, training)  # even if all are in it already: some modules clear a cache when `train` is called
    try:
        yield
    finally:
        for module, was_training in before:
            if module.training is not was_training and _overrides_train(module):
                module.train(was_training)
        for module, was_training in before:
            if module.training is not was_training:
                module.training = was_training


_RANDOM = (
    "Dropout",
    "DropPath",
    "DropBlock",
    "StochasticDepth",
)  # in the names of modules that drop something at random


def train_without_chance_(model: nn.Module) -> None:
    """Set every module to training mode, but for the layers that drop something at random."""
    for module in model.modules():
        module.training = not drops_at_random(module)  # of this module alone


_LIBRARIES = ("torch", "torchvision", "timm", "transformers")


def is_of_library(module: nn.Module) -> bool:
    """True if the class of a module comes from a known library of networks, whose code is well known."""
    return type(module).__module__.split(".")[0] in _LIBRARIES


def drops_at_random(module: nn.Module) -> bool:
    """True for a layer that drops something at random in training mode, and does nothing else."""
    return any(word in type(module).__name__ for word in _RANDOM) and next(module.children(), None) is None
