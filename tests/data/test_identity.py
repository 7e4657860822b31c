"""What tells a data set from the same one after a change, and what is said about the change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from passdeploy.data.identity import DataIdentity
from passdeploy.data.splits import load_data
from passdeploy.recipe import DataSpec


def write_images(root: Path, classes: tuple[str, ...] = ("ant", "bee")) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for name in classes:
            for number in range(count):
                path = root / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (9, 9), number).save(path)


def identity_of(root: Path) -> DataIdentity:
    identity = load_data(DataSpec(name="imagefolder", root=str(root), image_size=8)).identity
    assert identity is not None
    return identity


def rename_class(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "ant").rename(root / part / "zant")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: None, []),
        (
            lambda root: write_images(root, ("cat",)),
            ["class 'cat' is new", "6 training images then, 9 now", "4 test images then, 6 now"],
        ),
        (rename_class, ["class 'zant' is new", "class 'ant' is gone"]),
        (lambda root: (root / "test" / "bee" / "0.png").unlink(), ["4 test images then, 3 now"]),
        (
            lambda root: (root / "train" / "ant" / "0.png").rename(root / "train" / "ant" / "9.png"),
            ["as many training images, but with other names or labels"],
        ),
        (
            lambda root: (root / "train" / "ant" / "0.png").rename(root / "train" / "bee" / "9.png"),
            ["as many training images, but with other names or labels"],
        ),
    ],
)
def test_what_has_changed_is_said(change: Callable[[Path], object], said: list[str], tmp_path: Path):
    write_images(tmp_path)
    before = identity_of(tmp_path)
    change(tmp_path)
    read = DataIdentity.from_json(json.loads(json.dumps(before.to_json())))
    assert read == before
    assert identity_of(tmp_path).changes_since(read) == said


def test_a_folder_that_was_moved_holds_the_same_data(tmp_path: Path):
    write_images(tmp_path / "here")
    before = identity_of(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert identity_of(tmp_path / "there") == before


def test_a_held_out_share_and_a_set_without_files_have_an_identity_too(tmp_path: Path):
    write_images(tmp_path)
    share = identity_of(tmp_path / "train")
    assert (share.train.images, share.test.images) == (4, 2)
    (tmp_path / "train" / "ant" / "3.png").write_bytes((tmp_path / "train" / "ant" / "2.png").read_bytes())
    assert identity_of(tmp_path / "train").changes_since(share) == ["4 training images then, 5 now"]
    digits = [load_data(DataSpec(name="digits", image_size=8)).identity for _ in range(2)]
    assert digits[0] == digits[1] is not None
