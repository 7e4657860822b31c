"""Image folders as people have them: read as what they are, or refused; what is not used is said."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from passdeploy.data.image_files import image_endings
from passdeploy.data.image_folder import list_image_folder, split_of
from passdeploy.data.splits import ImageData, load_data
from passdeploy.errors import DataError, RecipeError
from passdeploy.images import decoded
from passdeploy.recipe import DataSpec
from tests.command_line import call_command


def draw(path: Path, kind: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 8), (200, 10, 10)).save(path, kind)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write two classes, each with four images to train on and two to test on."""
    for split, count in (("train", 4), ("test", 2)):
        for name in ("ant", "bee"):
            for number in range(count):
                draw(tmp_path / split / name / f"{number}.png")
    return tmp_path


def load(root: Path, **keys: str) -> ImageData:
    return load_data(DataSpec(name="imagefolder", root=str(root), image_size=8, **keys))


def counts(data: ImageData) -> tuple[dict[str, int], dict[str, int]]:
    assert data.contents is not None
    return dict(data.contents.train), dict(data.contents.test)


WHOLE = ({"ant": 4, "bee": 4}, {"ant": 2, "bee": 2})


# The folders of the splits


@pytest.mark.parametrize(
    "names", [("training", "testing"), ("train", "val"), ("train", "valid"), ("train", "validation")]
)
def test_the_usual_names_of_splits_are_known(root: Path, names: tuple[str, str]):
    for old, new in zip(("train", "test"), names, strict=True):
        (root / old).rename(root / new)
    assert counts(load(root)) == WHOLE


@pytest.mark.parametrize(
    "names", [("Train", "Val"), ("TRAIN", "TEST"), ("train", "Valid"), ("Training", "val"), ("train_set", "test2017")]
)
def test_names_that_look_like_splits_are_no_classes_and_can_be_given(root: Path, names: tuple[str, str]):
    for old, new in zip(("train", "test"), names, strict=True):
        (root / old).rename(root / new)
    with pytest.raises(DataError, match=f"--set data.train_folder={names[0]} --set data.test_folder={names[1]}"):
        load(root)
    assert counts(load(root, train_folder=names[0], test_folder=names[1])) == WHOLE


def test_a_folder_that_was_named_must_be_there(root: Path):
    with pytest.raises(RecipeError, match="has no folder 'Val'"):
        load(root, train_folder="train", test_folder="Val")


def test_words_that_only_begin_like_a_split_are_classes():
    assert [split_of(name) for name in ("trains", "tester", "evaluate_me", "value", "cat")] == [None] * 5


def test_classes_may_be_called_train_or_valid(tmp_path: Path):
    for names in (("bus", "car", "train"), ("invalid", "valid")):
        home = tmp_path / names[0]
        for name in names:
            for number in range(5):
                draw(home / name / f"{number}.png")
        assert load(home).classes == names


def move_images_out_of_their_classes(root: Path) -> None:
    for path in list((root / "train").rglob("*.png")):
        path.rename(root / "train" / f"{path.parent.name}_{path.name}")
    for folder in list((root / "train").iterdir()):
        if folder.is_dir():
            folder.rmdir()


def turn_inside_out(root: Path) -> None:
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (root / name).mkdir(exist_ok=True)
            (root / split / name).rename(root / name / split)
        (root / split).rmdir()


def wrap(root: Path) -> None:
    (root / "unpacked").mkdir()
    for split in ("train", "test"):
        (root / split).rename(root / "unpacked" / split)


def wrap_classes(root: Path) -> None:
    (root / "train").rename(root / "photos")
    for path in list((root / "test").rglob("*.png")):
        path.unlink()
    for folder in list((root / "test").iterdir()):
        folder.rmdir()
    (root / "test").rmdir()


def lose_training_images(root: Path) -> None:
    (root / "train" / "ant").rename(root / "ant")
    (root / "train" / "bee").rename(root / "bee")
    (root / "train").rmdir()


def link_test_to_train(root: Path) -> None:
    (root / "test").rename(root / "elsewhere")
    (root / "test").symlink_to(root / "train", target_is_directory=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (move_images_out_of_their_classes, "train holds images, but no class folder"),
        (turn_inside_out, "the splits lie inside, so 'ant' is no class"),
        (wrap, r"Give .*unpacked instead"),
        (wrap_classes, r"one folder, photos/, which would be the only class.\nIf .* give .*photos instead"),
        (lose_training_images, "has test/ but no train/, so test/ would count as a class"),
        (link_test_to_train, "are the same folder"),
    ],
)
def test_a_folder_of_another_layout_is_refused(root: Path, change: Callable[[Path], None], message: str):
    change(root)
    with pytest.raises(DataError, match=message) as caught:
        load(root)
    assert str(caught.value).count("\n") <= 2


def test_a_test_folder_without_labels_gives_way_to_the_one_for_validation(root: Path):
    (root / "test").rename(root / "val")
    draw(root / "test" / "1.png")
    data = load(root)
    assert counts(data) == WHOLE
    assert data.contents is not None
    assert data.contents.left_out == ("test/ beside train/ and val/",)


# The files


@pytest.mark.parametrize("ending", [".jfif", ".JPE", ".tga", ".jp2", ".pbm"])
def test_every_format_of_pillow_is_read(root: Path, ending: str):
    (root / "train" / "ant" / "0.png").unlink()
    kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".tga": "TGA", ".jp2": "JPEG2000", ".pbm": "PPM"}
    draw(root / "train" / "ant" / f"0{ending}", kinds[ending.lower()])
    data = load(root)
    assert counts(data) == WHOLE
    assert data.contents is not None
    assert f"1 {ending.lower()}" in data.contents.lines[2]


def test_formats_that_are_no_images_are_not_among_them():
    assert not {".h5", ".mpg", ".ps", ".grib", ".pdf"} & image_endings()
    assert {".jpg", ".png", ".webp", ".mpo"} <= image_endings()


def test_what_is_left_out_is_said(root: Path):
    home = root / "train" / "ant"
    (home / "notes.txt").write_text("no image")
    (home / "0.heic").write_bytes(b"no decoder")
    draw(home / ".ipynb_checkpoints" / "0.png")
    draw(root / "train" / "__MACOSX" / "0.png")
    draw(root / "train" / "stray.png")
    draw(root / "raw" / "0.png")
    (home / ".DS_Store").write_bytes(b"x")
    (home / "Thumbs.db").write_bytes(b"x")
    data = load(root)
    assert counts(data) == WHOLE
    assert data.contents is not None
    said = "; ".join(data.contents.left_out)
    for part in ("1 .txt", "1 .heic", "train/ant/.ipynb_checkpoints", "1 image directly in", "raw/ beside"):
        assert part in said
    assert "DS_Store" not in said
    assert "Thumbs" not in said


def test_a_class_of_files_that_pillow_does_not_read_names_them(root: Path):
    for path in list((root / "train" / "bee").iterdir()):
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(
        DataError, match=r"bee holds no image of a format that Pillow reads, but other files \(4 \.heic\)"
    ):
        load(root)


# Links


@pytest.mark.parametrize("target", [".", "train", "train/ant", "train/bee"])
def test_links_to_folders_whose_images_are_used_already_add_none(root: Path, target: str):
    (root / "train" / "ant" / "again").symlink_to(root / target, target_is_directory=True)
    data = load(root)
    assert counts(data) == WHOLE
    assert data.contents is not None
    assert "train/ant/again" in data.contents.left_out[0]


def test_links_to_images_elsewhere_are_followed(root: Path, tmp_path_factory: pytest.TempPathFactory):
    elsewhere = tmp_path_factory.mktemp("more")
    draw(elsewhere / "x" / "9.png")
    (root / "train" / "ant" / "more").symlink_to(elsewhere, target_is_directory=True)
    assert counts(load(root))[0] == {"ant": 5, "bee": 4}


def test_the_order_is_that_of_sorted_paths(root: Path):
    for name in ("1/x.png", "1a.png", "0-.png", "0/y/z.png"):
        draw(root / "train" / "ant" / name)
    paths = [Path(path) for path in list_image_folder(root, is_checked=True).train.paths]
    assert paths == [*sorted((root / "train" / "ant").rglob("*.png")), *sorted((root / "train" / "bee").rglob("*.png"))]


# Orientation


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_photographs_are_turned_as_a_viewer_shows_them(tmp_path: Path, orientation: int, ending: str):
    dark_above = np.linspace(0, 255, 32)[:, None].repeat(32, 1)
    upright = Image.fromarray(np.stack([dark_above] * 3, 2).astype(np.uint8))
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"1.{ending}"
    upright.transpose(turns[orientation]).save(path, exif=exif)
    pixels = decoded(path, 16)
    assert pixels.shape == (16, 16, 3)
    assert pixels[0].max() < 40
    assert pixels[-1].min() > 215


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow warns, and reads the pixels
def test_damaged_exif_data_make_no_image_unreadable(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x00")
    assert decoded(tmp_path / "1.jpg", 8).shape == (8, 8, 3)


# What the commands say


def test_check_says_how_many_images_of_which_class_are_used(root: Path, tmp_path: Path):
    (root / "train" / "ant" / "3.png").rename(root / "train" / "ant" / "3.txt")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "version: 1\nmodel: {name: passdeploy/resnet20_cifar}\n"
        f"data: {{name: imagefolder, root: {root}, image_size: 8, batch_size: 4}}\n"
        "prune: {round_to: 1, target: {macs: 0.6}, prompt: {kind: none}}\n"
    )
    said = call_command("check", "--recipe", recipe)
    assert said.exit_code == 0, said.output
    assert "train: 7 images: ant 3, bee 4" in said.stdout
    assert "test: 4 images, 2 of each of 2 classes" in said.stdout
    assert "left out: 1 file that is no image" in said.stdout


def test_an_image_without_content_is_refused_when_listed(root: Path):
    (root / "train" / "ant" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"0\.png is empty"):
        list_image_folder(root, is_checked=True)
    assert len(list_image_folder(root, is_checked=False).train.paths) == 8


def test_a_class_that_is_a_link_to_another_is_refused(tmp_path: Path):
    for name in ("cat", "dog"):
        for number in range(5):
            draw(tmp_path / name / f"{number}.png")
    (tmp_path / "kitten").symlink_to(tmp_path / "cat")
    with pytest.raises(DataError, match=r"'cat' and 'kitten' in .* are the same folder"):
        load(tmp_path)


def test_a_class_whose_name_no_file_can_hold_is_refused(tmp_path: Path):
    folder = os.fsencode(tmp_path)
    try:
        os.mkdir(folder + b"/caf\xe9")
    except OSError:
        pytest.skip("this file system takes no such name")
    (tmp_path / "tea").mkdir()
    with pytest.raises(DataError, match=r"'caf\\udce9' in .* is not UTF-8"):
        load(tmp_path)
