"""Settings of mask learning: their defaults, and how they follow from a recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from passdeploy.errors import UsageError
from passdeploy.recipe import FinetuneOptimizerSpec, PruneSpec, Recipe
from passdeploy.recipe.pruning import HypernetSpec, PromptSpec
from passdeploy.recipe.training import PruneOptimizerSpec
from passdeploy.sparsity import settings
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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weights", "freeze", "weights='freeze' is unknown"),
        ("optimizer", "adam", "optimizer='adam' is unknown"),
        ("prompt_kind", "border", "prompt_kind='border' is unknown"),
        ("hypernet_kind", "LSTM", "hypernet_kind='LSTM' is unknown"),
        ("allocation", "local", "allocation='local' is unknown"),
        ("anneal", 2.0, "anneal=2.0 is no share"),
        ("round_to", 0, "round_to=0 is too few"),
    ],
)
def test_settings_without_meaning_are_refused(name: str, value: object, message: str):
    with pytest.raises(UsageError, match=message):
        PassSettings(**{name: value})


@pytest.mark.parametrize("name", ["weights", "prompt_kind", "hypernet_kind", "optimizer", "allocation"])
def test_all_words_of_a_recipe_are_known(name: str):
    section, key = {
        "prompt_kind": (PromptSpec, "kind"),
        "hypernet_kind": (HypernetSpec, "kind"),
        "optimizer": (PruneOptimizerSpec, "name"),
    }.get(name, (PruneSpec, name))
    assert set(get_args(section.model_fields[key].annotation)) - {"auto"} == set(settings._WORDS[name])


@pytest.mark.parametrize(("method", "allocation"), [("uniform", "uniform"), ("pass", "global"), ("taylor", "global")])
def test_auto_is_uniform_only_for_the_method_of_that_name(method: str, allocation: str):
    assert allocation_of(PruneSpec(method=method)) == allocation
