"""Preprocessing of a recipe with pretrained weights: that with which they were published, unless the recipe says."""

from __future__ import annotations

from typing import Any

from passdeploy.models.published_input import published_input
from passdeploy.models.weights import PRETRAINED
from passdeploy.recipe import Recipe


def with_published_input(recipe: Recipe) -> Recipe:
    """Return the recipe with what its pretrained weights expect of images written out; any other as it is.

    The recipe's own `data.preprocessing` and `data.image_size` stay, where it has them.
    """
    data = recipe.data
    if recipe.model.weights != PRETRAINED or data.preprocessing is not None:
        return recipe
    published = published_input(recipe.model.name)
    if published is None:
        return recipe
    known: dict[str, Any] = {"preprocessing": published.preprocessing}
    if "image_size" not in data.model_fields_set:
        known["image_size"] = published.image_size
    return recipe.model_copy(update={"data": data.model_copy(update=known)})
