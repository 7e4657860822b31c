"""Which run `--resume` goes on with, and when it does not: another recipe, other images, damaged runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from passdeploy.commands import prune
from passdeploy.commands.resume import can_be_resumed, find_run_to_resume
from passdeploy.commands.run_data import DATA
from passdeploy.errors import CorruptArtifact, RunError
from passdeploy.recipe import Recipe, parse_recipe
from passdeploy.runs.folder import RunFolder
from passdeploy.runtime.events import Event, StageStarted
from tests.conftest import RECIPE, write_image_folder


def recipe(seed: int) -> Recipe:
    return parse_recipe(f"model: {{name: torchvision/resnet18}}\ndata: {{name: digits}}\nseed: {seed}", "r.yaml")


class Stopped(Exception):
    """A run that ends before its training begins."""


def begin(out: Path, seed: int) -> Path:
    """Make a run that has its recipe and nothing else."""
    with RunFolder.create(out, "run") as folder:
        folder.write_text("recipe.resolved.yaml", recipe(seed).to_yaml(), kind="recipe")
    return folder.path


@pytest.mark.parametrize("file", ["recipe.resolved.yaml", "manifest.json"])
def test_a_damaged_run_keeps_no_other_from_going_on(file: str, tmp_path: Path):
    damaged, whole = begin(tmp_path, 0), begin(tmp_path, 1)
    (damaged / file).write_text("seed: 5")
    assert find_run_to_resume(tmp_path, recipe(1)).name == whole.name
    assert can_be_resumed(tmp_path, recipe(1))
    said = r"run-0002 was made with another recipe: seed is 1 there, 0 here\.\nDamaged, and not looked at: run-0001\."
    with pytest.raises(RunError, match=said):
        find_run_to_resume(tmp_path, recipe(0))


def test_where_all_runs_are_damaged_the_newest_is_the_error(tmp_path: Path):
    for seed in (0, 1):
        (begin(tmp_path, seed) / "recipe.resolved.yaml").write_text("seed: 5")
    with pytest.raises(CorruptArtifact, match=r"run-0002.*is not the file that was written"):
        find_run_to_resume(tmp_path, recipe(1))


def test_a_run_goes_on_with_the_images_that_it_was_begun_with(tmp_path: Path):
    root, out, recipe_file = tmp_path / "images", tmp_path / "runs", tmp_path / "tiny.yaml"
    write_image_folder(root, images=6)
    recipe_file.write_text(RECIPE.format(root=root))

    def stop_before_training(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == "dense":
            raise Stopped

    def rename_class(old: str, new: str) -> None:
        for part in ("train", "test"):
            (root / part / old).rename(root / part / new)

    with pytest.raises(Stopped):
        prune.run(recipe_file, out=out, tell=stop_before_training)
    rename_class("class0", "zebra")
    said = r"since tiny-0001 was begun: class 'zebra' is new; class 'class0' is gone\.\nPut the images"
    with pytest.raises(RunError, match=said):
        prune.run(recipe_file, out=out, resume=True, tell=stop_before_training)
    with RunFolder.open(out / "tiny-0001", write=True) as folder:
        folder.remove(DATA)  # as earlier versions left it
    with pytest.raises(Stopped):
        prune.run(recipe_file, out=out, resume=True, tell=stop_before_training)
    rename_class("zebra", "class0")
    with pytest.raises(RunError, match="class 'class0' is new"):
        prune.run(recipe_file, out=out, resume=True, tell=stop_before_training)
