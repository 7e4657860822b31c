"""Check that a network which is built anew, and given the tensors of the first one, computes the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passdeploy.errors import ModelError, first_line
from passdeploy.models.weights import PRETRAINED
from passdeploy.recipe import Recipe
from passdeploy.runs.load import rebuild_dense
from passdeploy.training.losses import logits_of

_IMAGES = 2
_TOLERANCE = 1e-3  # of the largest logit: the same layers and tensors differ by rounding at most


def require_rebuildable(dense: nn.Module, recipe: Recipe, *, image: Tensor, num_classes: int, allow_code: bool) -> None:
    """Check that the networks of a run will be those that were pruned: a run folder keeps a name and tensors.

    A network that is built otherwise for its own weights, or by code of the user, may keep more than tensors: whether
    it normalises its input, say. The others are not built again.

    Args:
        dense: the network, on the CPU in eval mode.
        recipe: by which it was built.
        image: an example input, (1, 3, height, width).
        num_classes: as for `build_model`.
        allow_code: as for `build_model`.

    Raises:
        ModelError: the network that is built anew answers differently.
    """
    name, is_pretrained = recipe.model.name, recipe.model.weights == PRETRAINED
    if not is_pretrained and ":" not in name:
        return
    twin = rebuild_dense(recipe, num_classes, allow_code=allow_code)
    images = torch.randn(_IMAGES, *image.shape[1:], generator=torch.Generator().manual_seed(0))
    problem = _difference(dense, twin, images)
    if problem is not None:
        raise ModelError(
            f"{name} cannot be rebuilt from its tensors, as it will have to be after pruning: {problem}\n"
            "Let the factory build the same network in every call, with `pretrained` and without; what decides over "
            "its answers belongs into parameters, buffers or the arguments in the factory itself."
        )


def _difference(dense: nn.Module, twin: nn.Module, images: Tensor) -> str | None:
    """Say how the answers of `twin` differ once it has the tensors of `dense`; None if they do not."""
    try:
        twin.load_state_dict(dense.state_dict())
        with torch.no_grad():
            expected, found = logits_of(dense(images)), logits_of(twin(images))
    except Exception as error:  # the user's code may raise anything
        return f"built anew, it fails: {type(error).__name__}: {first_line(error, longest=160)}."
    if expected.shape != found.shape:
        return f"built anew, it answers with shape {tuple(found.shape)} instead of {tuple(expected.shape)}."
    differs_by = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if differs_by <= _TOLERANCE:
        return None
    return f"built anew with them, its answers differ by {differs_by:.1e} of the largest."
