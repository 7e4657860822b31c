"""From a YAML file to a Recipe: checked once, then trusted everywhere.

Every key has its default, its unit and its meaning in its section, and nowhere else; `recipe_schema()` publishes
them as JSON Schema. An unknown key is an error. What a name stands for (a model, a data set on disk)
is not looked up here: this module must stay importable without torch.

A key given on the command line as `--set a.b=c` is written over the file before anything is checked.
"""

from passdeploy.recipe.loading import find_recipe, load_recipe, parse_recipe, shipped_recipes
from passdeploy.recipe.pruning import MeasureSpec, Method, PromptSpec, PruneSpec, Target, TargetKind
from passdeploy.recipe.schema import DATASETS, DataSpec, GatesSpec, ModelSpec, Recipe, recipe_schema
from passdeploy.recipe.training import (
    DistillSpec,
    FinetuneOptimizerSpec,
    FinetuneSpec,
    OptimizerSpec,
    PruneOptimizerSpec,
    TrainSpec,
)

__all__ = [
    "DATASETS",
    "DataSpec",
    "DistillSpec",
    "FinetuneOptimizerSpec",
    "FinetuneSpec",
    "GatesSpec",
    "MeasureSpec",
    "Method",
    "ModelSpec",
    "OptimizerSpec",
    "PromptSpec",
    "PruneOptimizerSpec",
    "PruneSpec",
    "Recipe",
    "Target",
    "TargetKind",
    "TrainSpec",
    "find_recipe",
    "load_recipe",
    "parse_recipe",
    "recipe_schema",
    "shipped_recipes",
]
