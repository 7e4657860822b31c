"""Find the images of a data set on disk by its name: one function per layout (ImageNet, Food-101, CIFAR, ...).

Each function expects the folders and lists that the data set's own archive unpacks to; the error for a missing folder
says what to download and how it must be laid out. Image files are not decoded here. Nothing is downloaded, except for
`hf/NAME` (`hub.py`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from passdeploy.data.hub import find_hub_images
from passdeploy.data.image_files import folders_in
from passdeploy.data.image_folder import ListedImages, list_classes, list_image_folder
from passdeploy.data.images import Augmentation, Frame, ImageSource, RawDataset, crop_and_resize
from passdeploy.errors import DataError, RecipeError, UsageError, enumerated, require
from passdeploy.runtime.files import expanded
from passdeploy.runtime.seeds import generator

if TYPE_CHECKING:
    from passdeploy.recipe import DataSpec

TEST_SHARE = 0.2  # of every class, where the source has no test set of its own
_SPLIT_KEY = ("held-out share", 0)  # a constant, so that the same images are held out whatever the recipe's seed


def find_images(spec: DataSpec) -> RawDataset:
    """Find the images of the data set that `spec` names.

    Raises:
        UsageError: no data set of that name.
        RecipeError: `data.root` is missing or not there.
        DataError: a class without images, fewer than two classes, or a file that is not what the layout says.
    """
    if spec.name.startswith("hf/"):
        found = find_hub_images(spec, frame_of(spec))
    elif spec.name in _LOADERS:
        found = _LOADERS[spec.name](spec, frame_of(spec))
    else:
        raise UsageError(f"data.name is {spec.name!r}, which cannot be loaded.\nKnown: {', '.join(sorted(_LOADERS))}.")
    if len(found.classes) < 2:
        raise DataError(
            f"the data set {spec.name!r} has only one class, {found.classes[0]!r}.\n"
            "A classifier needs at least two: put the images of each class in a folder of its own."
        )
    return found


def frame_of(spec: DataSpec) -> Frame:
    """Return how a recipe crops and resizes images."""
    if spec.preprocessing is None:
        return Frame(spec.image_size)
    return Frame(spec.image_size, spec.preprocessing.interpolation, spec.preprocessing.crop)


def _split_off_test_set(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split indices into train and test: a fixed random fifth of every class, at least one image, is for testing."""
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)
    train: list[int] = []
    test: list[int] = []
    for label, members in sorted(of_class.items()):
        shuffled = torch.randperm(len(members), generator=generator(*_SPLIT_KEY, label)).tolist()
        count = max(1, round(TEST_SHARE * len(members)))
        test += [members[i] for i in shuffled[:count]]
        train += [members[i] for i in shuffled[count:]]
    return sorted(train), sorted(test)


def _digits(spec: DataSpec, frame: Frame) -> RawDataset:
    """Load scikit-learn's 1,797 scanned digits, 8x8 pixels (Alpaydin and Kaynak 1998)."""
    bunch = require("sklearn.datasets", extra="demo").load_digits()
    scans = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    source = ImageSource(lambda i: crop_and_resize(Image.fromarray(scans[i]), frame), tuple(bunch.target.tolist()))
    train, test = _split_off_test_set(source.labels)
    names = tuple(str(name) for name in bunch.target_names)
    return RawDataset(names, source.subset(train), source.subset(test), Augmentation(flip=False))


def _imagefolder(spec: DataSpec, frame: Frame) -> RawDataset:
    """Find images in one folder per class, below train/ and test/ (or val/), or directly below the root."""
    root = _root_of(spec, "a folder with train/<class>/ and test/<class>/, or with one folder per class")
    found = list_image_folder(
        root,
        is_checked=spec.on_unreadable == "error",
        train_folder=spec.train_folder,
        test_folder=spec.test_folder,
    )
    source = _listed(found.train, frame)
    if found.test is not None:
        return RawDataset(found.train.classes, source, _listed(found.test, frame), left_out=found.left_out)
    for name, count in found.train.per_class().items():
        if count < 2:
            raise DataError(
                f"class {name!r} in {root} has one image, too few to train and to test on.\n"
                "Add images, or provide train/ and test/ folders."
            )
    train, test = _split_off_test_set(source.labels)
    return RawDataset(found.train.classes, source.subset(train), source.subset(test), left_out=found.left_out)


def _listed(images: ListedImages, frame: Frame) -> ImageSource:
    return ImageSource.of_files(images.paths, images.labels, frame)


def _cifar(spec: DataSpec, frame: Frame) -> RawDataset:
    """Read CIFAR-10 or CIFAR-100 from the layout of their Python archives (Krizhevsky 2009).

    The files are pickles, so the MD5 of each is checked before torchvision reads them.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    reader = datasets.CIFAR10 if spec.name == "cifar10" else datasets.CIFAR100
    expected = f"the folder that holds {reader.base_folder}/, unpacked from {reader.url}"
    root = _root_of(spec, expected)
    folder = root / reader.base_folder
    if not folder.is_dir():
        raise RecipeError(f"{root} has no folder {reader.base_folder}.\ndata.root must be {expected}")
    for name, md5 in [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]:
        if not check_integrity(str(folder / name), md5):
            state = "is damaged (its MD5 is wrong)" if (folder / name).is_file() else "is missing"
            raise DataError(f"{folder / name} {state}.\nUnpack {reader.url} again.")

    def source(part: Any) -> ImageSource:
        return ImageSource(lambda i: crop_and_resize(Image.fromarray(part.data[i]), frame), tuple(part.targets))

    with warnings.catch_warnings():  # newer versions of NumPy warn about these old pickles
        warnings.simplefilter("ignore")
        train, test = (reader(str(root), train=is_train, download=False) for is_train in (True, False))
    return RawDataset(tuple(train.classes), source(train), source(test))


def _root_of(spec: DataSpec, expected: str) -> Path:
    if spec.root is None:
        raise RecipeError(f"data.name {spec.name!r} needs data.root: {expected}.\nGive it with --set data.root=PATH.")
    root = expanded(spec.root)
    if not root.is_dir():
        raise RecipeError(f"data.root {str(root)!r} is not a folder here.\nExpected {expected}.")
    return root


def _imagenet(spec: DataSpec, frame: Frame) -> RawDataset:
    """Find ImageNet-1k (Russakovsky et al., arXiv:1409.0575): 1.28 million photographs of 1,000 classes."""
    layout = "train/n01440764/*.JPEG and val/n01440764/*.JPEG, validation images sorted into class folders"
    root = _root_of(spec, _download_hint("ImageNet", "https://image-net.org/download", layout))
    homes = [_require_subfolder(root, name, spec) for name in ("train", "val")]
    is_checked = spec.on_unreadable == "error"
    train, test = (list_classes(home, folders_in(home), is_checked=is_checked, around=(root, home)) for home in homes)
    if train.classes != test.classes:
        raise DataError(
            f"train/ and val/ in {root} have different classes ({len(train.classes)} and {len(test.classes)}).\n"
            "The validation images must be sorted into the same class folders."
        )
    left_out = (*train.left_out, *test.left_out)
    return RawDataset(train.classes, _listed(train, frame), _listed(test, frame), left_out=left_out)


def _tiny_imagenet(spec: DataSpec, frame: Frame) -> RawDataset:
    """Find Tiny ImageNet (Le and Yang 2015): 100,000 photographs of 64x64 in 200 classes."""
    layout = "tiny-imagenet-200/wnids.txt, train/ and val/"
    root = _root_of(spec, _download_hint("Tiny ImageNet", "http://cs231n.stanford.edu/tiny-imagenet-200.zip", layout))
    home = _require_subfolder(root, "tiny-imagenet-200", spec)
    classes = tuple(_read_lines(home / "wnids.txt"))
    label = {name: number for number, name in enumerate(classes)}
    train = [
        (path, number)
        for name, number in label.items()
        for path in sorted((home / "train" / name / "images").glob("*.JPEG"))
    ]
    rows = [line.split("\t") for line in _read_lines(home / "val" / "val_annotations.txt")]
    test = [(home / "val" / "images" / row[0], _label_of(label, row[1], home)) for row in rows]
    return RawDataset(classes, _source_from_list(train, classes, frame), _source_from_list(test, classes, frame))


def _food101(spec: DataSpec, frame: Frame) -> RawDataset:
    """Find Food-101 (Bossard et al. 2014): 101,000 photographs of dishes."""
    layout = "food-101/images/CLASS/*.jpg and food-101/meta/train.json and test.json"
    root = _root_of(spec, _download_hint("Food-101", "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", layout))
    home = _require_subfolder(root, "food-101", spec)
    lists = [_read_json(home / "meta" / f"{part}.json") for part in ("train", "test")]
    classes = tuple(sorted(lists[0]))
    label = {name: number for number, name in enumerate(classes)}

    def source(images_of: dict[str, list[str]]) -> ImageSource:
        entries = [
            (home / "images" / f"{image}.jpg", _label_of(label, name, home))
            for name, images in sorted(images_of.items())
            for image in images
        ]
        return _source_from_list(entries, classes, frame)

    return RawDataset(classes, source(lists[0]), source(lists[1]))


def _dtd(spec: DataSpec, frame: Frame) -> RawDataset:
    """Find the Describable Textures (Cimpoi et al. 2014), first partition; its validation images are trained on too."""
    archive = "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz"
    layout = "dtd/images/CLASS/*.jpg and dtd/labels/train1.txt, val1.txt and test1.txt"
    root = _root_of(spec, _download_hint("DTD", archive, layout))
    home = _require_subfolder(root, "dtd", spec)
    names = {part: _read_lines(home / "labels" / f"{part}1.txt") for part in ("train", "val", "test")}
    classes = tuple(sorted({name.split("/")[0] for name in names["train"]}))
    label = {name: number for number, name in enumerate(classes)}

    def source(part: Sequence[str]) -> ImageSource:
        entries = [(home / "images" / name, _label_of(label, name.split("/")[0], home)) for name in part]
        return _source_from_list(entries, classes, frame)

    return RawDataset(classes, source(names["train"] + names["val"]), source(names["test"]))


def _stanford_cars(spec: DataSpec, frame: Frame) -> RawDataset:
    """Find Stanford Cars (Krause et al. 2013): 16,185 photographs of 196 car models, in the layout of torchvision."""
    layout = "stanford_cars/cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat"
    root = _root_of(spec, _download_hint("Stanford Cars", "a mirror, since the original page is gone", layout))
    home = _require_subfolder(root, "stanford_cars", spec)
    reader = require("scipy.io", extra="demo")

    def content(path: Path, key: str) -> Any:
        try:
            return np.atleast_1d(reader.loadmat(path, squeeze_me=True)[key])
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}.\nUnpack the data set again.") from error

    classes = tuple(str(name) for name in content(home / "devkit" / "cars_meta.mat", "class_names"))

    def source(folder: str, annotations: Path) -> ImageSource:
        rows = content(annotations, "annotations")
        entries = [(home / folder / str(row["fname"]), int(row["class"]) - 1) for row in rows]
        return _source_from_list(entries, classes, frame)

    train = source("cars_train", home / "devkit" / "cars_train_annos.mat")
    test = source("cars_test", home / "cars_test_annos_withlabels.mat")
    return RawDataset(classes, train, test)


def _source_from_list(entries: Sequence[tuple[Path, int]], classes: Sequence[str], frame: Frame) -> ImageSource:
    """Make a source from (path, label) entries; every class must have at least one image."""
    missing = sorted(set(range(len(classes))) - {label for _, label in entries})
    if missing:
        names = enumerated([repr(classes[label]) for label in missing], most=5)
        raise DataError(f"no image of {names} is listed.\nUnpack the data set again.")
    return ImageSource.of_files([str(path) for path, _ in entries], [label for _, label in entries], frame)


def _download_hint(name: str, address: str, layout: str) -> str:
    return f"the folder that holds {layout}; get {name} from {address}"


def _require_subfolder(root: Path, name: str, spec: DataSpec) -> Path:
    if not (root / name).is_dir():
        raise RecipeError(f"{root} has no folder {name}.\ndata.root for {spec.name} is the folder that holds {name}/.")
    return root / name


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip("\r\n") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.\nUnpack the data set again.") from error


def _read_json(path: Path) -> dict[str, list[str]]:
    try:
        content = json.loads("\n".join(_read_lines(path)))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}.\nUnpack the data set again.") from error
    assert isinstance(content, dict)
    return content


def _label_of(label: dict[str, int], name: str, home: Path) -> int:
    if name not in label:
        raise DataError(
            f"a list in {home} names the class {name!r}, which the training images do not have.\nUnpack it again."
        )
    return label[name]


_LOADERS: dict[str, Callable[[DataSpec, Frame], RawDataset]] = {
    "cifar10": _cifar,
    "cifar100": _cifar,
    "digits": _digits,
    "dtd": _dtd,
    "food101": _food101,
    "imagefolder": _imagefolder,
    "imagenet": _imagenet,
    "stanford-cars": _stanford_cars,
    "tiny-imagenet": _tiny_imagenet,
}
