"""A commented recipe for a network and images of the user: classes, image size and weights are looked up."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passdeploy.data.contents import DataContents
from passdeploy.data.datasets import find_images
from passdeploy.data.images import RawDataset
from passdeploy.errors import RecipeError, RunError, UsageError, clipped, require
from passdeploy.models.build import build_model
from passdeploy.models.published_input import PublishedInput, published_input
from passdeploy.models.weights import PRETRAINED
from passdeploy.recipe import DATASETS, SCHEMA_FILE, DataSpec, Recipe, parse_recipe, recipe_schema
from passdeploy.recipe.strict_yaml import dump
from passdeploy.runtime.files import expanded, write_for_user

_SIZES = {"digits": 64, "cifar10": 32, "cifar100": 32, "tiny-imagenet": 64}  # data sets of small images
_DATASETS = tuple(name for name in DATASETS if name != "imagefolder")


@dataclass(frozen=True)
class NewRecipe:
    """A recipe that was written, and what was found for it."""

    path: Path
    schema: Path  # the JSON Schema beside it, for editors
    recipe: Recipe
    contents: DataContents


def write_recipe(
    model: str,
    data: str,
    out: Path,
    *,
    root: str | None = None,
    train_folder: str | None = None,
    test_folder: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    allow_code: bool = False,
    overwrite: bool = False,
) -> NewRecipe:
    """Write a commented recipe, and its JSON Schema beside it.

    Args:
        model: torchvision/NAME, timm/NAME, passdeploy/NAME or pkg.mod:factory.
        data: a folder with a folder per class (below train/ and test/, or without them), the name of a data set, or
            hf/NAME.
        out: the file to write.
        root: the folder of the data set that `data` names.
        train_folder: name of the folder in `data` to train on; None: one of the usual names.
        test_folder: the same to test on; both are named, or neither.
        weights: `pretrained`, a file of weights, or `none`; None: pretrained where the library has weights.
        image_size: in pixels; None: what the network was made for.
        allow_code: import the module of a factory.
        overwrite: replace a file that is there.

    Raises:
        UsageError: no such data or file of weights, or `out` is there already.
        ModelError, DataError: the network or the images are not what a run needs.
    """
    if out.exists() and not overwrite:
        raise RunError(f"{out} is there already.\nName another file with --out, or replace it with --force.")
    published = published_input(model)
    usual = PRETRAINED if published is not None and _has_weights(model) else "none"
    chosen = usual if weights is None else weights
    if chosen not in (PRETRAINED, "none") and not expanded(chosen).is_file():
        raise UsageError(f"there is no file of weights {chosen}.\nGive a file, pretrained or none.")
    size = image_size or _SIZES.get(data) or usual_image_size(model, published)
    spec = _data_spec(data, root, train_folder, test_folder, size)
    contents = DataContents.of(_images_of(spec))
    build_model(model, num_classes=len(contents.train), allow_code=allow_code)  # an unknown name is an error now
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", out.stem).strip("-._")[:64] or "run"
    published = published if chosen == PRETRAINED else None
    options = shlex.join(["--recipe", str(out), *(["--allow-code"] if allow_code else [])])
    text = _text(name, model, None if chosen == "none" else chosen, spec, contents, clipped(options, 300), published)
    recipe = parse_recipe(text, out.name)
    schema = out.with_name(SCHEMA_FILE)
    write_for_user(out, text)
    write_for_user(schema, json.dumps(recipe_schema(), indent=2) + "\n")
    return NewRecipe(out, schema, recipe, contents)


def usual_image_size(model: str, published: PublishedInput | None) -> int:
    """Return the height and width in pixels that a network was made for; 224 where that is unknown."""
    if published is not None:
        return published.image_size
    return 32 if model.startswith("passdeploy/") else 224


def _has_weights(model: str) -> bool:
    """Test whether a library has weights for a network whose input it knows; timm also knows inputs without weights."""
    library, _, name = model.partition("/")
    return library != "timm" or bool(require("timm", extra="timm").get_pretrained_cfg(name).has_weights)


def _data_spec(
    data: str, root: str | None, train_folder: str | None, test_folder: str | None, image_size: int
) -> DataSpec:
    """Name the images: a folder of the user, or a data set."""
    if "" in (data, root, train_folder, test_folder):
        raise UsageError("the name of a folder or data set is empty.\nLeave the option out, or give it a name.")
    if (train_folder is None) != (test_folder is None):
        raise UsageError("--train-folder and --test-folder belong together.\nName both, or neither.")
    if expanded(data).is_dir():
        if root is not None:
            raise UsageError(f"--data {data} is a folder already: leave out --root.")
        return DataSpec(
            name="imagefolder", root=data, train_folder=train_folder, test_folder=test_folder, image_size=image_size
        )
    if data not in _DATASETS and not (data.startswith("hf/") and len(data) > len("hf/")):
        raise UsageError(
            f"there is no folder {data}, and no data set of that name.\n"
            f"Known data sets: {', '.join(_DATASETS)}, hf/NAME."
        )
    if train_folder is not None:
        raise UsageError(f"--train-folder and --test-folder lie in a folder of images, and {data} is a data set.")
    if data == "digits" and root is not None:
        raise UsageError("the digits come with scikit-learn: leave out --root.")
    return DataSpec(name=data, root=root, image_size=image_size)


def _images_of(spec: DataSpec) -> RawDataset:
    """Find the images; the error for a missing folder names the option to give.

    Raises:
        RecipeError, DataError: see `find_images`.
    """
    try:
        return find_images(spec)
    except RecipeError as error:
        if spec.root is not None:
            raise
        raise RecipeError(f"{str(error).splitlines()[0]}\nGive it with --root DIR.") from error


def _text(
    name: str,
    model: str,
    weights: str | None,
    spec: DataSpec,
    contents: DataContents,
    options: str,
    published: PublishedInput | None,
) -> str:
    """Write the recipe with its comments."""
    train, test = sum(contents.train.values()), sum(contents.test.values())
    batch = max(1, min(64, train // 4))
    classes = ", ".join(list(contents.train)[:8]) + (", ..." if len(contents.train) > 8 else "")
    comment = re.sub(r"\s+", " ", "".join(char if char.isprintable() else " " for char in classes))[:90]
    places = {key: getattr(spec, key) for key in ("root", "train_folder", "test_folder")}
    where = "".join(f"\n  {key}: {_scalar(value)}" for key, value in places.items() if value is not None)
    head = "random: the dense network is trained first"
    if weights == PRETRAINED:
        head = "if they are for other classes, the classifier is new, and the network is trained first"
    elif weights is not None:
        head = "if they are for other classes, add new_head: true, and the network is trained first"
    return f"""# yaml-language-server: $schema={SCHEMA_FILE}
#
#   passdeploy check {options}     loads everything, trains nothing, says how long a run takes
#   passdeploy prune {options}
#
# Keys that are left out have defaults: `passdeploy recipes schema` describes every one.

version: 1
name: {name}
seed: 0

# The network and its weights. null: it is trained first, as `train` says. A .safetensors file: your own weights.
model:
  name: {_scalar(model)}
  weights: {_scalar(weights)}        # {head}

# {train:,} images for training and {test:,} for testing, of {len(contents.train):,} classes: {comment}
# {_normalisation(published)}
data:
  name: {_scalar(spec.name)}{where}
  image_size: {spec.image_size}            # pixels, height and width
  batch_size: {batch}             # images per step

# Training of the dense network; not used where model.weights fit the classes.
train:
  epochs: 8
  optimizer: {{name: sgd, lr: {0.01 if weights else 0.05}}}

# Channels are removed until the target is met: one of macs, params, channels, latency (shares of the dense network)
# or latency_ms. A latency is measured: on what, says `measure`.
prune:
  method: pass
  target: {{macs: 0.5}}
  # target: {{latency: 0.5}}
  # measure: {{backend: ort, batch: 1, threads: 1}}
  steps: 300                 # of learning which channels matter

# Training of the slim network, half on the labels and half on the dense network's outputs.
finetune:
  epochs: 8

# Checked at the end of a run, which is kept; where it fails, the command exits with 4.
gates:
  top1_drop: 0.02            # of top-1, dense to slim: at most 2 points
"""


def _normalisation(published: PublishedInput | None) -> str:
    """Say how images are cropped and normalised."""
    if published is None:
        return "Images are cropped to a square and normalised with ImageNet's mean and std (data.preprocessing)."
    known = published.preprocessing
    mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (known.mean, known.std))
    return f"As the weights were published (data.preprocessing): mean {mean}, std {std}, crop {known.crop:.3g}."


def _scalar(value: Any) -> str:
    """Write a value in one line that YAML reads back as it is."""
    if value is None:
        return "null"
    line, *more = dump(value).splitlines()
    return json.dumps(value, ensure_ascii=False) if set(more) - {"..."} else line.strip()  # dump folds long lines
