"""Recipes: YAML files that say what a run does, read and checked into a frozen `Recipe`.

The section classes define every key with its default, unit and meaning; `recipe_schema()` publishes them as JSON
Schema. An unknown key is an error. `--set a.b=c` on the command line replaces a key of the file before the check.
Names of models and data sets are not resolved here, so that this package can be imported without torch.
"""

from passdeploy.recipe.augmentation import AugmentationSpec, RandAugmentSpec
from passdeploy.recipe.loading import find_recipe, load_recipe, parse_recipe, shipped_recipes
from passdeploy.recipe.preprocessing import PreprocessingSpec
from passdeploy.recipe.pruning import MeasureSpec, Method, PromptSpec, PruneSpec, Target, TargetKind
from passdeploy.recipe.schema import DATASETS, SCHEMA_FILE, DataSpec, GatesSpec, ModelSpec, Recipe, recipe_schema
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
    "SCHEMA_FILE",
    "AugmentationSpec",
    "DataSpec",
    "DistillSpec",
    "FinetuneOptimizerSpec",
    "FinetuneSpec",
    "GatesSpec",
    "MeasureSpec",
    "Method",
    "ModelSpec",
    "OptimizerSpec",
    "PreprocessingSpec",
    "PromptSpec",
    "PruneOptimizerSpec",
    "PruneSpec",
    "RandAugmentSpec",
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
