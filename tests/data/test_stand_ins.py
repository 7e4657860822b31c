"""Unreadable images of large sets are found on the way, and the next image of their class stands in for each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from passdeploy.data.feeding import DeviceFeed
from passdeploy.data.splits import ImageData, ImageSplit, load_data
from passdeploy.errors import DataError
from passdeploy.recipe import DataSpec


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write two classes of four images; each image has a grey of its own."""
    for split in ("train", "test"):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                grey = 20 + 100 * label + 20 * number
                Image.new("L", (8, 8), grey).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def load(root: Path, on_unreadable: str = "skip") -> ImageData:
    spec = DataSpec(name="imagefolder", root=str(root), image_size=8, workers=2, on_unreadable=on_unreadable)  # type: ignore[arg-type]
    return load_data(spec, cache_bytes=0)


def greys(data: ImageData, **options: object) -> list[int]:
    split = data.train
    assert isinstance(split, ImageSplit)
    pixels = torch.cat(list(split._reader.read([torch.arange(5), torch.arange(5, 8)], **options)))  # type: ignore[arg-type]
    return pixels[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("in_processes", [False, True])
def test_the_next_image_of_the_class_stands_in(root: Path, in_processes: bool):
    (root / "train" / "ant" / "1.png").write_bytes(b"no image")
    (root / "train" / "ant" / "2.png").write_bytes(b"")
    (root / "train" / "bee" / "3.png").write_bytes(b"no image")
    data = load(root)
    assert len(data.train) == 8
    assert not data.unreadable  # nothing was decoded yet
    for _ in range(2):
        assert greys(data, in_processes=in_processes) == [20, 80, 80, 80, 120, 140, 160, 120]
        assert sorted(reason.split(" cannot")[0][-9:] for reason in data.unreadable) == [
            "ant/1.png",
            "ant/2.png",
            "bee/3.png",
        ]


def test_it_makes_no_difference_when_images_are_looked_at(root: Path):
    (root / "train" / "ant" / "1.png").write_bytes(b"no image")
    whole, resumed = load(root), load(root)
    epochs = [torch.cat([images for images, _ in whole.train.batches(3, epoch=epoch)]) for epoch in (0, 1)]
    assert torch.equal(torch.cat([images for images, _ in resumed.train.batches(2, epoch=1)]), epochs[1])
    fed = DeviceFeed(resumed.train._reader, torch.device("cpu"))  # type: ignore[attr-defined]
    order = resumed.train._plans(torch.arange(8), 8, (0, 1), None)  # type: ignore[attr-defined]
    ((pixels, _),) = fed.batches(order)
    ((others, _),) = whole.train.batches(8)
    assert torch.equal(pixels, others)


def test_a_class_of_which_nothing_can_be_read_is_an_error(root: Path):
    for path in (root / "train" / "bee").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="no image of class 1 can be read; the first problem"):
        greys(load(root))


@pytest.mark.parametrize("in_processes", [False, True])
def test_without_skip_the_first_one_is_named(root: Path, in_processes: bool):
    (root / "train" / "ant" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"ant/1\.png cannot be read"):
        greys(load(root, "error"), in_processes=in_processes)
