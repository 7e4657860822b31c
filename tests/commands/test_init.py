"""`passdeploy init`: a recipe that runs, made from a folder of images, and `passdeploy recipes`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from passdeploy.commands import init
from passdeploy.data import datasets
from passdeploy.data.images import RawDataset
from passdeploy.recipe import DataSpec, load_recipe, recipe_schema, shipped_recipes
from tests.command_line import call_command
from tests.conftest import write_image_folder

ROOT = Path(__file__).parents[2]
NET = ("--model", "passdeploy/resnet20_cifar")
FOLDERS = ("--train-folder", "Train", "--test-folder", "Val")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "my photos: #1", images=6)
    write_image_folder(tmp_path / "alone", classes=1, images=3)
    return tmp_path


def test_a_recipe_is_made_for_a_network_and_a_folder(folder: Path):
    arguments = ("init", "--model", "passdeploy/resnet20_cifar", "--data", "my photos: #1", "--out", "mine.yaml")
    made = call_command(*arguments)
    assert made.exit_code == 0, made.output
    assert "12 images, 6 of each of 2 classes" in made.stdout
    assert made.stdout.splitlines()[-2:] == ["mine.yaml", "recipe.schema.json"]
    assert made.stderr == "next: passdeploy check --recipe mine.yaml\n"
    text = (folder / "mine.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert "of 2 classes: class0, class1" in text
    recipe = load_recipe("mine.yaml")
    assert (recipe.name, recipe.model.weights, recipe.data.root) == ("mine", None, "my photos: #1")
    assert (recipe.data.image_size, recipe.data.batch_size) == (32, 3)
    assert json.loads((folder / "recipe.schema.json").read_text()) == recipe_schema()
    assert call_command("check", "mine.yaml", "--json").exit_code == 0
    again = call_command(*arguments)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert call_command(*arguments, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("--model", "torchvision/resnet18", "--data", "nowhere"), 2, "there is no folder nowhere"),
        (("--model", "torchvision/resnet19", "--data", "digits"), 2, "resnet18"),
        (("--model", "torchvision/resnet18", "--data", "cifar10"), 2, "Give it with --root DIR."),
        ((*NET, "--data", "digits", "--root", "my photos: #1"), 2, "leave out --root"),
        ((*NET, "--data", "digits", *FOLDERS), 2, "lie in a folder of images, and digits is a data set"),
        ((*NET, "--data", "my photos: #1", *FOLDERS[:2]), 2, "belong together"),
        ((*NET, "--data", "my photos: #1", *FOLDERS), 2, "has no folder 'Train'"),
        ((*NET, "--data", ""), 2, "is empty"),
        ((*NET, "--data", "hf/"), 2, "Known data sets: digits, "),
        ((*NET, "--data", "alone"), 5, "only one class, 'class0'"),
        ((*NET, "--data", "digits", "--weights", "gone.pth"), 2, "there is no file of weights gone.pth"),
        (("--model", "torchvision/resnet18", "--data", "digits", "--out", "no/such/place/x.yaml"), 0, ""),
    ],
)
def test_what_cannot_be_made_is_explained(folder: Path, arguments: tuple[str, ...], code: int, expected: str):
    made = call_command("init", *arguments)
    assert made.exit_code == code
    assert expected in made.stderr
    assert len(made.stderr.splitlines()) <= 3


def test_the_recipe_names_itself_as_it_is_typed(folder: Path):
    arguments = ("--model", "passdeploy/resnet20_cifar", "--data", "my photos: #1", "--out", "my recipes/one.yaml")
    made = call_command("init", *arguments, "--allow-code")
    assert made.exit_code == 0, made.output
    assert made.stderr == "next: passdeploy check --recipe 'my recipes/one.yaml' --allow-code\n"
    text = (folder / "my recipes" / "one.yaml").read_text()
    assert "#   passdeploy prune --recipe 'my recipes/one.yaml' --allow-code\n" in text


def test_folders_of_other_names_are_written_into_the_recipe(folder: Path):
    photos = folder / "my photos: #1"
    (photos / "train").rename(photos / "Train")
    (photos / "test").rename(photos / "Val set")
    arguments = ("init", "--model", "passdeploy/resnet20_cifar", "--data", "my photos: #1")
    refused = call_command(*arguments)
    assert refused.exit_code == 5
    assert "--set data.train_folder=Train" in refused.stderr
    options = ("--train-folder", "Train", "--test-folder", "Val set")
    assert f"For init: {shlex.join(options)}\n" in refused.stderr
    made = call_command(*arguments, *options)
    assert made.exit_code == 0, made.output
    data = load_recipe("recipe.yaml").data
    assert (data.train_folder, data.test_folder) == ("Train", "Val set")
    assert call_command("check", "recipe.yaml", "--json").exit_code == 0


def test_a_data_set_of_the_hub_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def find_images(spec: DataSpec) -> RawDataset:
        assert spec.name == "hf/someone/digits: new"
        return datasets.find_images(DataSpec(name="digits", image_size=spec.image_size))

    monkeypatch.setattr(init, "find_images", find_images)
    arguments = ("--model", "passdeploy/resnet20_cifar", "--data", "hf/someone/digits: new")
    made = call_command("init", *arguments)
    assert made.exit_code == 0, made.output
    assert load_recipe("recipe.yaml").data.name == "hf/someone/digits: new"


def test_a_long_path_is_written_whole(folder: Path):
    long = " ".join(["a long name of a folder"] * 6)
    write_image_folder(folder / long)
    made = call_command("init", "--model", "passdeploy/resnet20_cifar", "--data", long)
    assert made.exit_code == 0, made.output
    assert load_recipe("recipe.yaml").data.root == long


def test_networks_take_the_size_and_the_normalisation_that_they_were_published_for(folder: Path):
    for name, size in (("resnet18", 224), ("efficientnet_b4", 380)):
        arguments = ("--model", f"torchvision/{name}", "--data", "my photos: #1", "--out", f"{name}.yaml")
        assert call_command("init", *arguments).exit_code == 0
        assert load_recipe(f"{name}.yaml").data.image_size == size
    assert "mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225" in (folder / "resnet18.yaml").read_text()


def test_networks_without_published_weights_start_at_random(folder: Path):
    for name, weights in (("botnet26t_256", "pretrained"), ("botnet50ts_256", None)):
        made = call_command("init", "--model", f"timm/{name}", "--data", "my photos: #1", "--out", f"{name}.yaml")
        assert made.exit_code == 0, made.output
        assert load_recipe(f"{name}.yaml").model.weights == weights


def test_recipes_are_listed_with_a_line_each():
    listed = call_command("recipes", "list")
    lines = listed.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if line.startswith("mobilenetv2 ")).split()[1:4] == [
        "mobilenet_v2",
        "digits",
        "64",
    ]
    details = json.loads(call_command("recipes", "list", "--json").stdout)["details"]
    assert {one["file"] for one in details} == set(shipped_recipes())
    assert next(one for one in details if one["data"] == "digits")["images_trained"] == 16 * 1438 + 300 * 64


def test_the_schema_is_a_file_that_every_recipe_names():
    schema = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())
    assert schema == recipe_schema(), "passdeploy recipes schema > recipes/recipe.schema.json"
    assert schema["$id"] == "urn:passdeploy:recipe:1"
    for name in shipped_recipes():
        first = (ROOT / "recipes" / name).read_text().splitlines()[0]
        assert first == "# yaml-language-server: $schema=recipe.schema.json"
    shown = call_command("recipes", "show", "mobilenetv2").stdout.splitlines()[0]
    assert Path(shown.partition("$schema=")[2]).is_file()
