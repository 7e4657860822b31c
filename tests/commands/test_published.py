"""Pretrained weights bring their own preprocessing, from the recipe to the exported file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from passdeploy.commands import export_model as export_model_module
from passdeploy.commands.export_model import export_model
from passdeploy.commands.published import with_published_input
from passdeploy.data.images import Frame, crop_and_resize, decode_file
from passdeploy.data.splits import load_data
from passdeploy.errors import RecipeError, UsageError
from passdeploy.export import Samples
from passdeploy.models.published_input import published_input
from passdeploy.recipe import DataSpec, PreprocessingSpec, Recipe, parse_recipe


def recipe(model: str, weights: str | None = "pretrained", border: int = 8, **data: object) -> Recipe:
    document = {
        "version": 1,
        "model": {"name": model, "weights": weights},
        "data": {"name": "digits", **data},
        "prune": {"prompt": {"size": border}},
    }
    return parse_recipe(json.dumps(document), "r.yaml")


@pytest.mark.parametrize(
    ("name", "size", "mean", "interpolation", "crop"),
    [
        ("timm/vit_base_patch16_224", 224, 0.5, "bicubic", 0.9),
        ("timm/resnet18.tv_in1k", 224, 0.485, "bilinear", 0.875),
        ("torchvision/resnet18", 224, 0.485, "bilinear", 224 / 256),
        ("torchvision/efficientnet_v2_m", 480, 0.485, "bilinear", 1.0),
        ("torchvision/efficientnet_b0", 224, 0.485, "bicubic", 224 / 256),
    ],
)
def test_what_weights_were_published_with_is_known(name: str, size: int, mean: float, interpolation: str, crop: float):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    published = published_input(name)
    assert published is not None
    spec = published.preprocessing
    assert (published.image_size, spec.mean[0], spec.interpolation) == (size, mean, interpolation)
    assert spec.crop == pytest.approx(crop)


def test_nothing_is_published_for_other_networks():
    assert published_input("torchvision/nowhere") is None
    assert published_input("passdeploy/resnet20_cifar") is None
    assert published_input("mine:net") is None


def test_a_recipe_says_in_full_what_its_pretrained_weights_expect():
    whole = with_published_input(recipe("torchvision/efficientnet_b0"))
    assert whole.data.image_size == 224
    assert parse_recipe(whole.to_yaml(), "r.yaml") == whole
    assert with_published_input(whole) == whole
    assert with_published_input(recipe("torchvision/efficientnet_b0", image_size=96)).data.image_size == 96
    same = recipe("torchvision/efficientnet_b0", weights=None)
    assert with_published_input(same) == same


def test_size_and_preprocessing_are_filled_in_each_by_itself():
    own = recipe("torchvision/efficientnet_b0", preprocessing={"interpolation": "nearest"})
    whole = with_published_input(own)
    assert (whole.data.image_size, whole.data.preprocessing) == (224, own.data.preprocessing)
    assert with_published_input(whole) == whole
    both = recipe("torchvision/efficientnet_b0", preprocessing={"interpolation": "nearest"}, image_size=96)
    assert with_published_input(both) == both


def test_the_border_of_the_prompt_must_fit_into_images_of_the_size_that_is_used():
    assert with_published_input(recipe("torchvision/efficientnet_b0", border=40)).data.image_size == 224
    with pytest.raises(RecipeError, match=r"prune\.prompt\.size: a border of 112 pixels .* the widest is 111"):
        with_published_input(recipe("torchvision/efficientnet_b0", border=112))
    with pytest.raises(RecipeError, match="the widest is 31"):  # nothing is published, so the default is used
        with_published_input(recipe("passdeploy/resnet20_cifar", border=40))
    for keys in ({"weights": None}, {"image_size": 64}):
        with pytest.raises(RecipeError, match="the widest is 31"):
            recipe("torchvision/efficientnet_b0", border=40, **keys)


def test_a_spread_of_zero_is_refused():
    with pytest.raises(RecipeError, match="std"):
        recipe("torchvision/resnet18", preprocessing={"std": [0, 1, 1]})


def photograph(path: Path, width: int = 60, height: int = 40) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / 5 + shift) * np.cos(columns / 7) * 120 + 128 for shift in range(3)]
    image = Image.fromarray(np.stack(waves, 2).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return image


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_are_framed_as_the_publishers_do(tmp_path: Path, interpolation: str):
    image = photograph(tmp_path / "1.png")
    pixels = crop_and_resize(image, Frame(28, interpolation, 28 / 32))
    mode = v2.InterpolationMode(interpolation)
    theirs = v2.CenterCrop(28)(v2.Resize(32, interpolation=mode, antialias=True)(v2.PILToTensor()(image)))
    assert np.abs(pixels.astype(int) - theirs.numpy().astype(int)).mean() < 2  # they round the size in between
    assert np.array_equal(decode_file(tmp_path / "1.png", Frame(28, interpolation, 28 / 32)), pixels)


def test_splits_are_framed_and_normalised_as_the_recipe_says(tmp_path: Path):
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            photograph(tmp_path / split / name / "1.png")
    preprocessing = PreprocessingSpec.model_validate(
        {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "crop": 0.5}
    )
    spec = DataSpec(name="imagefolder", root=str(tmp_path), image_size=16, preprocessing=preprocessing)
    for cache_bytes in (0, 10**9):
        data = load_data(spec, cache_bytes=cache_bytes)
        assert (data.mean, data.std) == (preprocessing.mean, preprocessing.std)
        pixels = decode_file(tmp_path / "train" / "ant" / "1.png", Frame(16, "bicubic", 0.5))
        images, _ = next(iter(data.train.batches(2)))
        torch.testing.assert_close(images[0], (torch.from_numpy(pixels) / 255 - 0.5) / 0.25)


def test_exported_files_carry_the_preprocessing_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = torchvision.models.squeezenet1_1(weights=None)
    weights = torchvision.models.SqueezeNet1_1_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: network.state_dict())
    written: dict[str, Any] = {}

    def export(_: object, samples: Samples, *__: object, metadata: dict[str, Any], **___: object) -> list[Any]:
        written.update(metadata, samples=samples)
        return []

    monkeypatch.setattr("passdeploy.commands.export_model.export_artifacts", export)
    export_model("torchvision/squeezenet1_1", weights="pretrained", out=tmp_path)
    assert written["preprocessing"] == {"interpolation": "bilinear", "crop": 0.875}
    assert written["image_shape"] == [3, 224, 224]
    assert written["mean"] == list(written["samples"].mean) == [0.485, 0.456, 0.406]


@pytest.mark.parametrize("published", [21843, 0])
def test_an_export_has_the_classes_of_the_pretrained_weights(published: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export_model_module, "published_classes", lambda _: published)
    if published:
        assert export_model_module._count_classes("timm/resnet18.in21k", "pretrained", False) == published
        return
    with pytest.raises(UsageError, match=r"timm/resnet18\.features have no classifier"):
        export_model_module._count_classes("timm/resnet18.features", "pretrained", False)


def test_a_network_that_nobody_knows_is_left_to_its_builder():
    assert export_model_module._count_classes("torchvision/no_such_network", "pretrained", False) == 1000
