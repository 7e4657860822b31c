"""The recipes that come with passdeploy, with a line about each."""

from __future__ import annotations

from typing import Any

from passdeploy.display.listing import Listing
from passdeploy.display.units import quantity
from passdeploy.errors import UNKNOWN
from passdeploy.recipe import Recipe, load_recipe, shipped_recipes

# Images that the data sets are trained on.
_IMAGES = {
    "digits": 1_438,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "tiny-imagenet": 100_000,
    "food101": 75_750,
    "dtd": 3_760,
    "stanford-cars": 8_144,
    "imagenet": 1_281_167,
}


def describe_recipes() -> list[dict[str, Any]]:
    """Describe every shipped recipe: file, model, data set, image size, target, and images that training sees."""
    return [{"file": name, **_describe(load_recipe(name))} for name in shipped_recipes()]


def _describe(recipe: Recipe) -> dict[str, Any]:
    images = _IMAGES.get(recipe.data.name)
    epochs = recipe.finetune.epochs + (0 if recipe.model.weights else recipe.train.epochs)
    batch_size = recipe.data.batch_size
    prune = recipe.prune.counted(images or batch_size, batch_size)
    learned = prune.steps * (prune.batch_size or batch_size)
    target = prune.target
    return {
        "model": recipe.model.name,
        "data": recipe.data.name,
        "image_size": recipe.data.image_size,
        "target": {target.kind: target.value},
        "images_trained": None if images is None else epochs * images + learned,
    }


def recipes_table(recipes: list[dict[str, Any]]) -> Listing:
    """Build the table of recipes."""
    rows = []
    for recipe in recipes:
        trained = UNKNOWN if recipe["images_trained"] is None else quantity(recipe["images_trained"])
        model = recipe["model"].rpartition("/")[2]
        name = recipe["file"].removesuffix(".yaml")
        rows.append((name, model, recipe["data"], str(recipe["image_size"]), trained))
    notes = (
        "trained on: images that a run goes through. mobilenetv2 takes 3 to 6 minutes on two CPU cores; "
        "passdeploy check RECIPE estimates the time of any recipe here",
    )
    headings = ("recipe", "model", "data", "pixels", "trained on")
    return Listing(headings, tuple(rows), notes=notes, left=frozenset({0, 1, 2}))
