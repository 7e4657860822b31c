"""Data sets of the Hugging Face hub: which part is tested on, and images that cannot be decoded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from passdeploy.data.splits import load_data
from passdeploy.errors import DataError, MissingExtra
from passdeploy.recipe import DataSpec

CLASSES = ("ant", "bee")
NAME = "hf/someone/insects"


class ClassLabel:
    names = CLASSES


class Part(list[dict[str, Any]]):
    """A part of a data set: rows, columns by their name, and the kinds of the columns."""

    def __init__(self, *rows: tuple[Any, int | None], has_labels: bool = True) -> None:
        super().__init__({"picture": image, "kind": label} for image, label in rows)
        kinds: dict[str, Any] = {"picture": type("Image", (), {})(), "kind": ClassLabel()}
        self.features = {name: kind for name, kind in kinds.items() if has_labels or name == "picture"}

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


ANT, BEE = Image.new("L", (9, 9), 0), Image.new("L", (9, 9), 60)
TRAIN = Part((ANT, 0), (BEE, 1))
SECRET = Part((ANT, -1), (BEE, -1), (BEE, -1))


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that publishes the parts of a data set, as the `datasets` library loads them."""

    def publish(**parts: Part) -> None:
        library: Any = ModuleType("datasets")
        library.load_dataset = lambda name: parts
        monkeypatch.setitem(sys.modules, "datasets", library)

    return publish


def loaded(**keys: Any) -> Any:
    return load_data(DataSpec(name=NAME, image_size=8, **keys))


def test_a_data_set_is_read_by_the_kinds_of_its_columns(publish: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    publish(train=TRAIN, validation=Part((BEE, 1), (ANT, 0)))
    data = loaded()
    assert data.classes == CLASSES
    assert next(iter(data.test.batches(2)))[1].tolist() == [1, 0]
    assert data.contents.left_out == ()
    publish(all=TRAIN)
    with pytest.raises(DataError, match="has the parts all"):
        loaded()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"passdeploy\[hf\]"):
        loaded()


@pytest.mark.parametrize("test", [SECRET, Part((ANT, None), (BEE, None)), Part((ANT, None), has_labels=False)])
def test_validation_is_tested_on_where_the_labels_of_test_are_secret(test: Part, publish: Callable[..., None]):
    publish(train=TRAIN, test=test, validation=Part((BEE, 1), (ANT, 0), (ANT, 0), (BEE, 1)))
    data = loaded()
    assert next(iter(data.test.batches(9)))[1].tolist() == [1, 0, 0, 1]
    assert data.contents.left_out == ("the part test, whose labels are secret",)


def test_secret_labels_are_an_error_before_anything_is_trained(publish: Callable[..., None]):
    publish(train=TRAIN, test=SECRET, validation=SECRET)
    with pytest.raises(DataError, match="keeps the labels of test and validation secret"):
        loaded()
    publish(train=SECRET, test=TRAIN)
    with pytest.raises(DataError, match="images without a label in its part train"):
        loaded()


class Truncated:
    """An image whose bytes end too early: the decoder fails when it loads the pixels."""

    mode = "RGB"

    def load(self) -> None:
        raise OSError("image file is truncated (3 bytes not processed)")


@pytest.mark.parametrize(
    ("image", "reason"),
    [(Truncated(), "truncated"), (Image.new("F", (9, 9)), "pixels of mode 'F' have no known range")],
)
@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_an_image_that_cannot_be_decoded_is_named_or_skipped(
    image: Any, reason: str, cache_bytes: int, publish: Callable[..., None]
):
    publish(train=Part((ANT, 0), (BEE, 1), (image, 1)), test=TRAIN)
    spec = DataSpec(name=NAME, image_size=8)
    with pytest.raises(DataError, match=rf"image 2 of {NAME} \(train\) cannot be read as an image: .*{reason}"):
        list(load_data(spec, cache_bytes=cache_bytes).train.batches(3))
    data = load_data(spec.model_copy(update={"on_unreadable": "skip"}), cache_bytes=cache_bytes)
    assert sum(len(labels) for _, labels in data.train.batches(3)) == (2 if cache_bytes else 3)
    assert len((*data.skipped, *data.unreadable)) == 1
