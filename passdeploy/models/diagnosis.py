"""Errors of a network on images, explained: its channels, the type of its weights, or the size of the images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from passdeploy.errors import ModelError, PassDeployError, UsageError, first_line

_CHANNELS = re.compile(r"expected input\[\d+, 3, .*\] to have (\d+) channels?, but got 3 channels")


@contextmanager
def image_errors(model: nn.Module, name: str, image_size: int, *, advice: str) -> Iterator[None]:
    """Report the failure of a network on RGB images of a size as an error of the user's choice of network or size.

    Args:
        model: the network that is run in the block.
        name: what to call it.
        image_size: height and width of the images that it is given, in pixels.
        advice: a sentence that says how to choose another size.

    Raises:
        ModelError: its weights are not float32, it takes another number of channels than three, or fails for another
            reason than the size.
        UsageError: it cannot take such images.
    """
    try:
        yield
    except PassDeployError:
        raise
    except Exception as error:  # a user's code may raise anything
        if (problem := mismatch_of(model, error)) is not None:
            raise ModelError(f"{name} {problem}") from error
        reason = first_line(error, longest=160)
        is_about_size = isinstance(error, RuntimeError | ValueError | AssertionError)
        if not is_about_size or any(word in reason for word in ("NVIDIA", "CUDA", "cuda")):
            raise ModelError(
                f"{name} fails on one image of {image_size} x {image_size} pixels: {type(error).__name__}: {reason}.\n"
                "It must take a batch of RGB images, (batch, 3, height, width), and nothing else, on any device."
            ) from error
        raise UsageError(
            f"{name} cannot take images of {image_size} x {image_size} pixels: {reason}.\n{advice}"
        ) from error


def mismatch_of(model: nn.Module, error: Exception) -> str | None:
    """Explain an error of a network on RGB images in float32 by the network itself; None if that does not explain it.

    Returns:
        The end of a sentence that begins with the name of the network, and a line that says what to do.
    """
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if others := sorted(str(each).removeprefix("torch.") for each in types - {torch.float32}):
        return (
            f"has weights in {', '.join(others)}, and images are float32.\n"
            "Call .float() on the network; precision: fp16 or bf16 under train computes in fewer bits."
        )
    if found := _CHANNELS.search(str(error)):
        takes = "1 channel (grey images)" if found[1] == "1" else f"{found[1]} channels"
        return (
            f"takes images of {takes}, and all images here have 3 (RGB).\n"
            "Give its first layer 3 input channels; grey images are read with three equal ones."
        )
    return None


def require_own_weights(model: nn.Module, name: str) -> None:
    """Check that no layer computes its weight anew in every call, by the old hooks of `torch.nn.utils`.

    Raises:
        ModelError: a layer does; the message says how to end it.
    """
    for layer_name, layer in model.named_modules():
        shown = f"layer {layer_name!r} of {name}"
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, torch_prune.BasePruningMethod):
                tensor = hook._tensor_name
                raise ModelError(
                    f"{shown} still has a mask of torch.nn.utils.prune on its {tensor}.\n"
                    f"Make it permanent: torch.nn.utils.prune.remove(layer, {tensor!r}) for each masked layer."
                )
            for kind, remove in ((WeightNorm, "remove_weight_norm"), (SpectralNorm, "remove_spectral_norm")):
                if isinstance(hook, kind):
                    raise ModelError(
                        f"{shown} has torch.nn.utils.{remove.removeprefix('remove_')}, which cannot be copied.\n"
                        f"Call torch.nn.utils.{remove}(layer), or use torch.nn.utils.parametrizations instead."
                    )
