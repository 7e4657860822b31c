"""Image folders: one folder per class, below folders for training and testing, or directly below the root.

The folders of the splits have their usual names, or those that the recipe gives. Names that only look like them
(`Train`, `VALID`, `test2017`) are never taken for classes: the error says how to name them. A folder that fits no
layout is refused with what was found, and what is not used is said: otherwise it would be read as another data set.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from passdeploy.data.image_files import FolderId, ImageLister, folder_id, folders_in, images_in
from passdeploy.errors import DataError, RecipeError, enumerated

# Split -> the names that its folder has; for testing, test/ comes first.
_NAMES = {"train": ("train", "training"), "test": ("test", "testing"), "val": ("val", "valid", "validation")}
_ALIKE = {"train": {"trn"}, "test": {"tst"}, "val": {"dev", "eval", "evaluation"}}
_ALSO_CLASSES = {"valid", "dev", "eval"}  # splits only beside training images
_LAYOUT = "Expected train/CLASS/ and test/CLASS/ (or val/CLASS/), or one folder per class."


@dataclass(frozen=True)
class ListedImages:
    """Image files of one split, with their classes."""

    folder: Path
    classes: tuple[str, ...]  # label -> name
    paths: list[str]
    labels: list[int]
    left_out: tuple[str, ...]  # what lies there and is not used, one sentence for each reason
    visited: dict[FolderId, str]  # the folders that the images lie in

    def per_class(self) -> dict[str, int]:
        """Count the images of each class."""
        counts = Counter(self.labels)
        return {name: counts[label] for label, name in enumerate(self.classes)}


@dataclass(frozen=True)
class ImageFolder:
    """Images of a data set: those for training and those for testing, or (`test` is None) all in one."""

    train: ListedImages
    test: ListedImages | None
    left_out: tuple[str, ...]


def split_of(name: str) -> str | None:
    """Return which split a folder of this name seems to be for: `train`, `test` or `val`; None for any other name.

    >>> split_of("Train"), split_of("VALIDATION_SET"), split_of("test2017"), split_of("trains")
    ('train', 'val', 'test', None)
    """
    plain = re.sub(r"[\W_\d]+", "", name.casefold())
    plain = re.sub(r"(?<=.)(dataset|data|set|split|images|imgs|img)$", "", plain)
    return next((split for split in _NAMES if plain in (*_NAMES[split], *_ALIKE[split])), None)


def list_image_folder(
    root: Path, *, is_checked: bool, train_folder: str | None = None, test_folder: str | None = None
) -> ImageFolder:
    """List the images of an image folder.

    Args:
        root: the folder.
        is_checked: refuse dangling links and empty files.
        train_folder: name of the folder of the training images; None: one of the usual names.
        test_folder: name of the folder of the test images; None: one of the usual names.

    Raises:
        RecipeError: a folder that was named is not there.
        DataError: the folder fits no layout, a class has no image, or training and test images have other classes or
            are the same.
    """
    folders = folders_in(root)
    names = _split_folders(root, folders, train_folder, test_folder)
    if names is None:
        _refuse_other_layouts(root, folders)
        images = list_classes(root, folders, is_checked=is_checked, around=(root,))
        return ImageFolder(images, None, images.left_out)
    train, test = (
        list_classes(home, folders_in(home), is_checked=is_checked, around=(root, home))
        for home in (root / name for name in names)
    )
    _require_same_classes(root, train, test)
    _require_other_images(train, test)
    unused = [f"{name}/" for name in folders if name not in names]
    beside = (f"{', '.join(unused[:5])} beside {names[0]}/ and {names[1]}/",) if unused else ()
    return ImageFolder(train, test, (*beside, *train.left_out, *test.left_out))


def list_classes(folder: Path, classes: Sequence[str], *, is_checked: bool, around: Sequence[Path]) -> ListedImages:
    """List the images of each class folder in `folder`.

    Args:
        folder: that holds the class folders.
        classes: their names, in the order of the labels.
        is_checked: refuse dangling links and empty files.
        around: folders that no link may lead back to.

    Raises:
        DataError: there is no class, a class without images, or one that is a link to another; or a name is not UTF-8.
    """
    if not classes:
        what = "images, but no class folder" if images_in(folder) else "no images"
        raise DataError(f"{folder} holds {what}.\n{_LAYOUT}")
    lister = ImageLister(folder.parent if len(around) > 1 else folder, around, is_checked=is_checked)
    taken = [folder_id(folder / name) for name in classes]
    _require_distinct(folder, classes, taken)
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        others_before = Counter(lister.others)
        found = lister.images_below(folder / name, taken)
        if not found:
            raise DataError(_no_image_message(folder / name, lister.others - others_before))
        paths += found
        labels += [label] * len(found)
    stray = _stray_images(folder)
    return ListedImages(folder, tuple(classes), paths, labels, (*stray, *lister.left_out()), lister.visited)


def _require_distinct(folder: Path, classes: Sequence[str], folders: Sequence[FolderId]) -> None:
    """Raise a DataError where two classes are one folder, or where a file cannot hold the name of one."""
    first: dict[FolderId, str] = {}
    for name, own in zip(classes, folders, strict=True):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"the name of the class folder {name!r} in {folder} is not UTF-8.\nRename it.") from None
        if (other := first.setdefault(own, name)) != name:
            raise DataError(
                f"the class folders {other!r} and {name!r} in {folder} are the same folder, so that its images would "
                "have two labels.\nRemove the link."
            )


def _split_folders(
    root: Path, folders: Sequence[str], train_folder: str | None, test_folder: str | None
) -> tuple[str, str] | None:
    """Return the names of the folders to train and to test on; None if the classes lie in the root itself.

    Raises:
        DataError: one of the two is missing, or has a name that only looks like one of a split.
    """
    if train_folder and test_folder:
        for name in (train_folder, test_folder):
            if not (root / name).is_dir():
                raise RecipeError(f"{root} has no folder {name!r}.\nIt has {', '.join(folders[:8]) or 'none'}.")
        return train_folder, test_folder
    train = next((name for name in _NAMES["train"] if name in folders), None)
    held_out = [name for split in ("test", "val") for name in _NAMES[split] if name in folders]
    alike = {split: [name for name in folders if split_of(name) == split] for split in _NAMES}
    if train and not held_out and _is_class_of_that_name(root, train, folders):
        return None
    if (alike["train"] and not train) or (train and not held_out and (alike["test"] or alike["val"])):
        first, second = train or alike["train"][0], next(iter([*held_out, *alike["test"], *alike["val"]]), "TEST")
        odd = [name for name in (first, second) if name not in (train, *held_out) and name in folders]
        in_recipe = [quote(f"data.{split}_folder={name}") for split, name in (("train", first), ("test", second))]
        raise DataError(
            f"{root} has {' and '.join(f'{name}/' for name in odd)}, which {'are' if len(odd) > 1 else 'is'} neither "
            "a class nor called train, test or val.\n"
            f"Rename the folder, or name both: --set {in_recipe[0]} --set {in_recipe[1]}\n"
            f"For init: --train-folder {quote(first)} --test-folder {quote(second)}"
        )
    if train and not held_out:
        raise DataError(
            f"{root} has {train}/ but neither test/ nor val/.\n"
            f"Add one, or give {root / train} instead: a fixed fifth of each class is then held out."
        )
    # test/ has no class folders where its labels are secret
    return (train, next((name for name in held_out if folders_in(root / name)), held_out[0])) if train else None


def _is_class_of_that_name(root: Path, name: str, folders: Sequence[str]) -> bool:
    """True if a folder called `train` looks like a class, beside others: trains, buses and cars."""
    others = [other for other in folders if other != name]
    return len(others) > 1 and not folders_in(root / name) and all(images_in(root / other) for other in others)


def _refuse_other_layouts(root: Path, folders: Sequence[str]) -> None:
    """Refuse a folder without train/ that holds something else than one folder per class.

    Raises:
        DataError: test images without training images, splits one level deeper, or all classes in one folder.
    """
    held_out = [name for name in folders if split_of(name) in ("test", "val") and name not in _ALSO_CLASSES]
    if held_out:
        raise DataError(
            f"{root} has {held_out[0]}/ but no train/, so {held_out[0]}/ would count as a class.\n"
            f"{_LAYOUT} If {held_out[0]} is a class, rename it."
        )
    for name in folders:
        inside = folders_in(root / name)
        kinds = {split_of(folder) for folder in inside} - {None}
        if "train" in kinds and len(kinds) > 1:
            raise DataError(
                f"{root / name} holds {inside[0]}/ and {inside[-1]}/: the splits lie inside, so {name!r} is no class.\n"
                + (f"Give {root / name} instead." if len(folders) == 1 else _LAYOUT)
            )
    if len(folders) == 1 and len(folders_in(root / folders[0])) > 1:
        raise DataError(
            f"{root} holds one folder, {folders[0]}/, which would be the only class.\n"
            f"If the classes lie in it, give {root / folders[0]} instead."
        )


def _require_same_classes(root: Path, train: ListedImages, test: ListedImages) -> None:
    if train.classes == test.classes:
        return
    odd = sorted(set(train.classes) ^ set(test.classes))
    shown = enumerated([repr(name) for name in odd], most=5)
    raise DataError(
        f"{train.folder.name}/ and {test.folder.name}/ in {root} have different classes.\n"
        f"Only one of them has {shown}; both need the same class folders."
    )


def _require_other_images(train: ListedImages, test: ListedImages) -> None:
    """Refuse test images that are the training images, by way of a link."""
    shared = next((own for own in test.visited if own in train.visited), None)
    if shared is not None:
        raise DataError(
            f"{test.visited[shared]} and {train.visited[shared]} are the same folder: accuracy would be that of images "
            "trained on.\nRemove the link, and put images there that are not trained on."
        )


def _stray_images(folder: Path) -> tuple[str, ...]:
    """Describe images beside the class folders, which belong to no class."""
    count = images_in(folder)
    return (f"{count:,} image{'s' if count > 1 else ''} directly in {folder}, of no class",) if count else ()


def _no_image_message(folder: Path, others: Counter[str]) -> str:
    kinds = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in others.most_common(3))
    held = f"no image of a format that Pillow reads, but other files ({kinds})" if others else "holds no image"
    has = f"holds {held}" if others else held
    return (
        f"class folder {folder} {has}.\n{'Convert them, or remove' if others else 'Add images, or remove'} the folder."
    )
