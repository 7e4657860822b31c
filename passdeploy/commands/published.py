"""Input of a recipe with pretrained weights: size and preprocessing with which they were published, unless it says."""

from __future__ import annotations

from typing import Any

from passdeploy.errors import RecipeError
from passdeploy.models.published_input import published_input
from passdeploy.models.weights import PRETRAINED
from passdeploy.recipe import Recipe


def with_published_input(recipe: Recipe) -> Recipe:
    """Return the recipe with what its pretrained weights expect of images written out; any other as it is.

    The recipe's own `data.preprocessing` and `data.image_size` stay, each where it has it.

    Raises:
        RecipeError: the border of the prompt does not fit into images of the published size.
    """
    completed = _completed(recipe)
    if problem := completed.border_problem:
        raise RecipeError(f"prune.prompt.size: {problem}")
    return completed


def _completed(recipe: Recipe) -> Recipe:
    data = recipe.data
    takes_preprocessing, takes_size = data.preprocessing is None, "image_size" not in data.model_fields_set
    if recipe.model.weights != PRETRAINED or not (takes_preprocessing or takes_size):
        return recipe
    published = published_input(recipe.model.name)
    if published is None:
        return recipe
    known: dict[str, Any] = {"preprocessing": published.preprocessing} if takes_preprocessing else {}
    if takes_size:
        known["image_size"] = published.image_size
    return recipe.model_copy(update={"data": data.model_copy(update=known)})
