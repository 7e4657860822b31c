"""Load the networks of a run: rebuilt from the model's name, the plan and the tensors, without unpickling."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

from torch import nn

from passdeploy.errors import CorruptArtifact
from passdeploy.models.build import build_model
from passdeploy.models.cloning import named_plain_tensors
from passdeploy.models.prompt import VisualPrompt, with_prompt
from passdeploy.models.selected_channels import select_channels_named_
from passdeploy.models.weights import PRETRAINED
from passdeploy.recipe import Recipe, parse_recipe
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.numbering import LATEST
from passdeploy.runs.plan_file import replacements_from_json, sizes_from_json
from passdeploy.slimming.slim import resize_
from passdeploy.slimming.substitutes import replace_modules_


def load(run: Path | str = LATEST, which: str = "slim", *, allow_code: bool = False) -> nn.Module:
    """Load a network of a run, on the CPU in evaluation mode; it takes normalised images (batch, 3, height, width).

    It is built by name, resized as the plan says, and filled with the tensors. Each file is verified; none is a pickle.

    Args:
        run: the run folder.
        which: `slim` or `dense`.
        allow_code: let the recipe name a model factory, which runs its module's code.

    Raises:
        RunError: no such run, or it has no such network yet.
        CorruptArtifact: a file is not what was written.
    """
    return load_network(RunFolder.open(Path(run)), which, allow_code)


def summary_of(run: Path | str = LATEST) -> dict[str, Any]:
    """Read the content of a run's `summary.json`, verified."""
    summary: dict[str, Any] = RunFolder.open(Path(run)).read_json("summary.json")
    return summary


_REQUIRED_KEYS = {"model", "classes", "image_shape", "prompt", "groups", "numbers"}  # of a plan.json


def read_plan_document(folder: RunFolder) -> dict[str, Any]:
    """Read the content of a run's `plan.json`.

    Raises:
        CorruptArtifact: a key that this version writes is missing.
    """
    document: dict[str, Any] = folder.read_json("plan.json")
    if missing := sorted(_REQUIRED_KEYS - document.keys()):
        raise CorruptArtifact(
            f"plan.json of {folder.path} says nothing of {', '.join(missing)}: "
            "another version of passdeploy wrote it.\n"
            f"Prune again: passdeploy prune --recipe {quote(str(folder.path / 'recipe.resolved.yaml'))}"
        )
    return document


def load_network(folder: RunFolder, which: str, allow_code: bool) -> nn.Module:
    """Load a network as `load` does, from a run folder that is open."""
    document = read_plan_document(folder)
    tensors = folder.read_tensors(f"{which}.safetensors")
    network = rebuild_dense(recipe_of(folder), len(document["classes"]), allow_code=allow_code)
    replacements = replacements_from_json(document) if which == "slim" else []
    replace_modules_(network, replacements)
    select_channels_named_(network, tensors)
    prompt = None
    if which == "slim" and document["prompt"]:
        kind, size = document["prompt"]["kind"], document["prompt"]["size"]
        prompt = VisualPrompt(kind, tuple(document["image_shape"]), size)
        tensors = prompt.load_pixels_(tensors)
    known = network.state_dict().keys()
    hidden = {**dict(network.named_buffers()), **dict(named_plain_tensors(network))}.keys()
    if not known <= tensors.keys() <= known | hidden:
        raise CorruptArtifact(
            f"{which}.safetensors of {folder.path} does not hold the tensors of {document['model']}.\n"
            "It was made with another version of the model's library: install that one (manifest.json)."
        )
    resize_(network, tensors, sizes_from_json(document) if which == "slim" else ())
    return with_prompt(network, prompt).eval()


def rebuild_dense(recipe: Recipe, num_classes: int, *, allow_code: bool) -> nn.Module:
    """Build the dense network of a recipe as it was for pruning, with random weights: tensors of a run replace them."""
    return build_model(
        recipe.model.name,
        num_classes=num_classes,
        as_pretrained=recipe.model.weights == PRETRAINED,
        allow_code=allow_code,
        seed=recipe.seed,
    )


def recipe_of(folder: RunFolder) -> Recipe:
    """Read the recipe of a run, with all defaults filled in."""
    return parse_recipe(folder.read_text("recipe.resolved.yaml"), "recipe.resolved.yaml")
