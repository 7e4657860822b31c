"""Settings of mask learning: their defaults, and how they follow from a recipe."""

from __future__ import annotations

from dataclasses import replace

import pytest

from passdeploy.recipe import FinetuneOptimizerSpec, PruneSpec, Recipe
from passdeploy.sparsity.settings import PassSettings, allocation_of


def recipe(**prune: object) -> Recipe:
    return Recipe(model={"name": "resnet20_cifar"}, data={"name": "digits"}, prune=prune)


def test_the_defaults_are_those_of_a_recipe_without_distillation():
    settings = PassSettings.from_recipe(recipe(distill=None), round_to=8)
    assert settings.weights_optimizer == FinetuneOptimizerSpec()
    assert replace(settings, weights_optimizer=None, temperature=4.0) == PassSettings()


def test_settings_follow_the_recipe():
    settings = PassSettings.from_recipe(
        recipe(steps=7, weights_lr=0.3, distill={"alpha": 0.2, "only_better": True}, allocation="uniform"), round_to=4
    )
    assert (settings.steps, settings.round_to, settings.allocation) == (7, 4, "uniform")
    assert (settings.distill, settings.temperature, settings.only_better) == (0.2, 4.0, True)
    assert settings.weights_optimizer == FinetuneOptimizerSpec(lr=0.3)


@pytest.mark.parametrize(("method", "allocation"), [("uniform", "uniform"), ("pass", "global"), ("taylor", "global")])
def test_auto_is_uniform_only_for_the_method_of_that_name(method: str, allocation: str):
    assert allocation_of(PruneSpec(method=method)) == allocation
