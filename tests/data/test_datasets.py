"""Data sets, read from small files in the layout that their archives unpack to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from passdeploy.channels.allocation import Budget, smallest_plan
from passdeploy.data.datasets import _split_off_test_set
from passdeploy.data.splits import load_data
from passdeploy.errors import DataError, RecipeError
from passdeploy.grouping.find import map_channels
from passdeploy.models.build import build_model
from passdeploy.recipe import DATASETS, DataSpec, load_recipe, shipped_recipes

CLASSES = ("ant", "bee")


def picture(path: Path, grey: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (grey, grey, grey)).save(path, format="JPEG")


def imagenet(root: Path) -> None:
    for part in ("train", "val"):
        for number, name in enumerate(CLASSES):
            picture(root / part / name / f"{name}_1.JPEG", 50 + 100 * number)
    (root / "test").mkdir()  # images without labels, in the real archive


def tiny_imagenet(root: Path) -> None:
    home = root / "tiny-imagenet-200"
    for number, name in enumerate(CLASSES):
        picture(home / "train" / name / "images" / f"{name}_0.JPEG", 50 + 100 * number)
        picture(home / "val" / "images" / f"val_{number}.JPEG", 50 + 100 * number)
    (home / "wnids.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    rows = [f"val_{number}.JPEG\t{name}\t0\t0\t9\t9\n" for number, name in enumerate(CLASSES)]
    (home / "val" / "val_annotations.txt").write_text("".join(rows))


def food101(root: Path) -> None:
    home = root / "food-101"
    (home / "meta").mkdir(parents=True)
    for part, image in (("train", "1"), ("test", "2")):
        for number, name in enumerate(CLASSES):
            picture(home / "images" / name / f"{image}.jpg", 50 + 100 * number)
        (home / "meta" / f"{part}.json").write_text(json.dumps({name: [f"{name}/{image}"] for name in CLASSES}))


def dtd(root: Path) -> None:
    home = root / "dtd"
    (home / "labels").mkdir(parents=True)
    for part in ("train", "val", "test"):
        for number, name in enumerate(CLASSES):
            picture(home / "images" / name / f"{name}_{part}.jpg", 50 + 100 * number)
        (home / "labels" / f"{part}1.txt").write_text("".join(f"{name}/{name}_{part}.jpg\n" for name in CLASSES))


def stanford_cars(root: Path) -> None:
    from scipy.io import savemat

    home = root / "stanford_cars"
    (home / "devkit").mkdir(parents=True)
    savemat(home / "devkit" / "cars_meta.mat", {"class_names": np.array(CLASSES, dtype=object)})
    lists = {
        "cars_train": home / "devkit" / "cars_train_annos.mat",
        "cars_test": home / "cars_test_annos_withlabels.mat",
    }
    for folder, path in lists.items():
        rows = np.zeros(2, dtype=[("class", object), ("fname", object)])
        for number in range(2):
            picture(home / folder / f"0000{number}.jpg", 50 + 100 * number)
            rows[number] = (number + 1, f"0000{number}.jpg")
        savemat(path, {"annotations": rows})


LAYOUTS: dict[str, tuple[Callable[[Path], None], int]] = {  # name -> (writer of small files, training images)
    "imagenet": (imagenet, 2),
    "tiny-imagenet": (tiny_imagenet, 2),
    "food101": (food101, 2),
    "dtd": (dtd, 4),
    "stanford-cars": (stanford_cars, 2),
}


def loaded(name: str, root: Path):
    return load_data(DataSpec(name=name, root=str(root), image_size=8))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_of_the_archive_is_read(name: str, tmp_path: Path):
    write, training = LAYOUTS[name]
    write(tmp_path)
    data = loaded(name, tmp_path)
    assert data.classes == CLASSES
    assert (len(data.train), len(data.test)) == (training, 2)
    for split in (data.train, data.test):
        images, labels = next(iter(split.batches(8)))
        bright = images.mean((1, 2, 3)) > 0  # the second class is bright
        assert bright.tolist() == [label == 1 for label in labels.tolist()]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_missing_root_says_what_to_get_and_how_it_lies(name: str, tmp_path: Path):
    with pytest.raises(RecipeError, match=r"needs data\.root: the folder that holds .+; get .+ from ") as caught:
        load_data(DataSpec(name=name, image_size=8))
    assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(RecipeError, match="has no folder"):
        loaded(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("tiny-imagenet", "tiny-imagenet-200/wnids.txt"),
        ("food101", "food-101/meta/test.json"),
        ("dtd", "dtd/labels/val1.txt"),
        ("stanford-cars", "stanford_cars/devkit/cars_meta.mat"),
    ],
)
def test_a_list_that_is_gone_is_named(name: str, gone: str, tmp_path: Path):
    LAYOUTS[name][0](tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(DataError, match=Path(gone).name):
        loaded(name, tmp_path)


def test_a_class_that_no_image_is_listed_of_is_named(tmp_path: Path):
    food101(tmp_path)
    (tmp_path / "food-101" / "meta" / "test.json").write_text(json.dumps({"ant": ["ant/2"], "bee": []}))
    with pytest.raises(DataError, match="no image of 'bee'"):
        loaded("food101", tmp_path)


def test_every_data_set_of_a_recipe_can_be_loaded():
    from passdeploy.data.datasets import _LOADERS

    assert set(_LOADERS) == set(DATASETS)


def test_unreadable_images_are_skipped_and_listed_if_the_recipe_says_so(tmp_path: Path):
    for part in ("train", "test"):
        for name in CLASSES:
            for index in range(2):
                picture(tmp_path / part / name / f"{index}.jpg")
    (tmp_path / "train" / "bee" / "1.jpg").write_bytes(b"no picture")
    spec = DataSpec(name="imagefolder", root=str(tmp_path), image_size=8, on_unreadable="skip")
    data = load_data(spec)
    assert (len(data.train), len(data.test), len(data.skipped)) == (3, 4, 1)
    assert "1.jpg cannot be read" in data.skipped[0]
    (tmp_path / "train" / "bee" / "0.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="no image of class 'bee' can be read"):
        load_data(spec)


class CountedLabels(list[int]):
    """Labels that count how often somebody goes through them."""

    passes = 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return super().__iter__()


def test_images_are_held_out_in_one_pass_however_many_classes_there_are():
    labels = CountedLabels(number % 50 for number in range(500))
    train, test = _split_off_test_set(labels)
    assert labels.passes == 1
    assert sorted(train + test) == list(range(500))
    assert set(Counter(labels[index] for index in test).values()) == {2}


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if "imagenet" in name or "-" in name])
def test_every_shipped_recipe_names_a_network_that_can_be_cut_to_its_budget(name: str):
    """Do what `passdeploy check` does, without the data, on the smallest image that all networks take."""
    recipe = load_recipe(name)
    model = build_model(recipe.model.name, num_classes=10, weights=None)
    channels = map_channels(model, torch.zeros(1, 3, 64, 64), include=recipe.prune.include)
    budget = Budget.of(recipe.prune.target.kind, recipe.prune.target.value, channels.costs)
    smallest_plan(channels.prunable, channels.costs, budget, round_to=8)
