"""Splits: batches depend only on (seed, epoch, position), and errors name bad folders and files."""

import pickle
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from passdeploy.data.splits import IMAGENET_MEAN, IMAGENET_STD, ImageData, load_data, worker_count
from passdeploy.errors import DataError, RecipeError, UsageError
from passdeploy.recipe import DataSpec

Batches = Iterator[tuple[Tensor, Tensor]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two classes, each with four tiny images for training and two for testing."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


def digits(**changes: int) -> ImageData:
    return load_data(DataSpec(name="digits", image_size=8), **changes)


def images_in(root: Path, **changes: int) -> ImageData:
    return load_data(DataSpec(name="imagefolder", root=str(root), image_size=8), **changes)


def concatenated(batches: Batches) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_digits_are_split_the_same_way_every_time_with_a_fifth_of_every_class_held_out():
    first, second = digits(), digits()
    assert (len(first.train), len(first.test), first.classes) == (1438, 359, tuple("0123456789"))
    assert torch.equal(concatenated(first.test.batches(400))[0], concatenated(second.test.batches(400))[0])
    train, test = (split.labels.bincount() for split in (first.train, first.test))  # type: ignore[attr-defined]
    assert ((test / (train + test) - 0.2).abs() < 0.005).all()


def test_train_and_test_share_no_digit():
    data = digits()
    seen = {image.numpy().tobytes() for image in concatenated(data.train.batches(2000))[0]}
    assert not any(image.numpy().tobytes() in seen for image in concatenated(data.test.batches(2000))[0])


def test_images_are_normalised_as_pretrained_networks_expect(tmp_path: Path):
    for name, grey in (("black", 0), ("white", 255)):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.new("L", (8, 8), grey).save(tmp_path / name / f"{index}.png")
    images, labels = concatenated(images_in(tmp_path).test.batches(9))
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    assert labels.tolist() == [0, 1]
    assert (images.dtype, images.shape) == (torch.float32, (2, 3, 8, 8))
    torch.testing.assert_close(images[:, :, 3, 3], torch.stack([(0 - mean) / std, (1 - mean) / std]))


def test_an_epoch_is_one_order_of_all_images_whatever_the_batch_size():
    data = digits().train
    small, large = (concatenated(data.batches(size, epoch=3, seed=1, augment=True)) for size in (50, 333))
    assert torch.equal(small[0], large[0])
    assert torch.equal(small[1], large[1])
    in_order = concatenated(data.batches(2000))[1]
    assert not torch.equal(small[1], in_order)
    assert torch.equal(small[1].sort().values, in_order.sort().values)


@pytest.mark.parametrize("other", [{"epoch": 4, "seed": 1}, {"epoch": 3, "seed": 2}])
def test_another_epoch_or_seed_is_another_order(other: dict[str, int]):
    data = digits().train
    labels, other_labels = (concatenated(data.batches(99, **key))[1] for key in ({"epoch": 3, "seed": 1}, other))
    assert not torch.equal(labels, other_labels)


def test_batches_neither_use_nor_move_the_global_generator():
    data, before = digits().train, torch.get_rng_state()
    concatenated(data.batches(99, epoch=1, augment=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("augment", [False, True])
def test_decoding_on_the_fly_gives_the_bits_of_decoding_at_once(folder: Path, augment: bool):
    held, fresh = images_in(folder), images_in(folder, cache_bytes=0)
    walks = [list(data.train.batches(1, epoch=2, augment=augment)) for data in (held, fresh)]
    assert len(walks[0]) == len(walks[1]) == 8
    for (images, labels), (other_images, other_labels) in zip(*walks, strict=True):
        assert torch.equal(images, other_images)
        assert images.stride() == other_images.stride()  # the order in memory decides how a convolution rounds
        assert torch.equal(labels, other_labels)


def test_a_walk_on_the_fly_may_be_left_early(folder: Path):
    batches = images_in(folder, cache_bytes=0).train.batches(1, epoch=0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]


def test_digits_are_shifted_and_never_mirrored():
    data = digits().train
    plain, shifted = (concatenated(data.batches(2000, epoch=0, augment=augment))[0] for augment in (False, True))
    black = (-torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD)).view(3, 1, 1)
    framed = torch.zeros(len(plain), 3, 10, 10) + black
    framed[:, :, 1:9, 1:9] = plain  # an eighth of 8 pixels is one
    crops = [framed[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    matches = torch.stack([((crop - shifted).abs() < 1e-6).flatten(1).all(1) for crop in crops])
    assert matches.any(0).all()
    assert (matches.sum(1) > 100).all()  # every shift occurs


def test_photographs_are_mirrored_half_of_the_time(tmp_path: Path):
    ramp = np.repeat(np.arange(8, dtype=np.uint8)[None, :, None] * 30, 8, axis=0).repeat(3, axis=2)
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for index in range(100):
            Image.fromarray(ramp).save(tmp_path / name / f"{index}.png")
    images, _ = concatenated(images_in(tmp_path).train.batches(200, epoch=0, augment=True))
    rises = images[:, 0, 4, 5] > images[:, 0, 4, 2]
    assert 0.35 < rises.float().mean() < 0.65


def test_the_last_batch_is_short_or_left_out():
    data = digits().test
    assert [len(labels) for _, labels in data.batches(100)] == [100, 100, 100, 59]
    assert [len(labels) for _, labels in data.batches(100, epoch=0, drop_last=True)] == [100, 100, 100]


@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_a_subset_has_the_images_of_its_indices(folder: Path, cache_bytes: int):
    split = images_in(folder, cache_bytes=cache_bytes).train
    chosen = torch.tensor([5, 0, 3])
    images, labels = concatenated(split.batches(8))
    some, some_labels = concatenated(split.subset(chosen).batches(2))  # type: ignore[attr-defined]
    assert torch.equal(some, images[chosen])
    assert torch.equal(some_labels, labels[chosen])


def test_augmentation_without_an_epoch_is_refused():
    with pytest.raises(ValueError, match="per epoch"):
        digits().train.batches(8, augment=True)


def test_wide_images_lose_their_sides_and_16_bit_images_keep_their_range(tmp_path: Path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        deep = np.full((8, 16), 0x8001 if name == "bee" else 0, dtype=np.uint16)
        deep[:, :4] = deep[:, 12:] = 30000  # outside of the central square
        for index in range(2):
            Image.fromarray(deep).save(tmp_path / name / f"{index}.png")
    images, _ = concatenated(images_in(tmp_path).test.batches(2))
    pixels = images * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    assert pixels[0].abs().max() < 1e-6
    torch.testing.assert_close(pixels[1], torch.full((3, 8, 8), 128 / 255))


def test_val_serves_as_test(folder: Path):
    (folder / "test").rename(folder / "val")
    assert len(images_in(folder).test) == 4


def test_a_name_we_cannot_load_lists_those_we_can():
    with pytest.raises(UsageError, match="Known: cifar10, cifar100, digits, dtd"):
        load_data(DataSpec.model_construct(name="food102", root=None, image_size=8, on_unreadable="error"))


@pytest.mark.parametrize("name", ["imagefolder", "cifar10", "cifar100"])
def test_a_root_that_is_not_given_or_not_there_is_a_mistake_in_the_recipe(name: str, tmp_path: Path):
    with pytest.raises(RecipeError, match=r"needs data\.root"):
        load_data(DataSpec(name=name))
    with pytest.raises(RecipeError, match="nowhere"):
        load_data(DataSpec(name=name, root=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated", "dangling"])
def test_a_damaged_image_is_named(folder: Path, content: bytes | str):
    bad = folder / "train" / "bee" / "2.png"
    whole = bad.read_bytes()
    bad.unlink()
    if content == "dangling":
        bad.symlink_to(folder / "gone.png")
    else:
        bad.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"bee/2\.png") as caught:
        images_in(folder)
    assert str(caught.value).count("\n") <= 2


def test_an_image_that_is_damaged_later_is_named_too(folder: Path):
    data = images_in(folder, cache_bytes=0)
    (folder / "train" / "ant" / "0.png").write_bytes(b"overwritten")
    with pytest.raises(DataError, match=r"ant/0\.png"):
        concatenated(data.train.batches(2))


def test_folders_that_cannot_train_a_classifier_are_refused(folder: Path):
    (folder / "train" / "cat").mkdir()
    with pytest.raises(DataError, match="cat holds no image"):
        images_in(folder)
    (folder / "train" / "cat").rmdir()
    for image in (folder / "test" / "bee").iterdir():
        image.unlink()
    (folder / "test" / "bee").rename(folder / "test" / "cow")
    Image.new("RGB", (8, 8)).save(folder / "test" / "cow" / "0.png")
    with pytest.raises(DataError, match="'bee', 'cow'"):
        images_in(folder)


def test_one_class_no_class_and_no_test_set_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    with pytest.raises(DataError, match="holds no images"):
        images_in(tmp_path_factory.mktemp("empty"))
    for part in ("train", "test"):
        (folder / part / "bee").rename(folder / f"{part}-bee")
    with pytest.raises(DataError, match="only one class, 'ant'"):
        images_in(folder)
    (folder / "test").rename(folder / "unused")
    with pytest.raises(DataError, match=r"or give .*train instead"):
        images_in(folder)


@pytest.mark.parametrize(("name", "key"), [("cifar10", b"labels"), ("cifar100", b"fine_labels")])
def test_cifar_is_read_from_its_archives_and_checked(
    name: str, key: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reader = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = tmp_path / reader.base_folder
    with pytest.raises(RecipeError, match=reader.base_folder):
        load_data(DataSpec(name=name, root=str(tmp_path)))
    folder.mkdir()

    def written(file_name: str, content: dict[str, object]) -> str:
        (folder / file_name).write_bytes(pickle.dumps(content))
        return md5((folder / file_name).read_bytes(), usedforsecurity=False).hexdigest()

    pixels = np.arange(2 * 3072, dtype=np.uint64).astype(np.uint8).reshape(2, 3072)
    for part in ("train_list", "test_list"):
        entries = [
            (file_name, written(file_name, {"data": pixels, key.decode(): [0, 1]}))
            for file_name, _ in getattr(reader, part)
        ]
        monkeypatch.setattr(reader, part, entries)
    meta = {**reader.meta, "md5": written(reader.meta["filename"], {reader.meta["key"]: ["ant", "bee"]})}
    monkeypatch.setattr(reader, "meta", meta)

    data = load_data(DataSpec(name=name, root=str(tmp_path), image_size=32))
    images, labels = concatenated(data.test.batches(4))
    assert data.classes == ("ant", "bee")
    assert labels.tolist() == [0, 1]
    red = images[1, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]
    torch.testing.assert_close((red * 255).round().flatten().to(torch.uint8), torch.from_numpy(pixels[1, :1024]))

    (folder / meta["filename"]).write_bytes(b"damaged")
    with pytest.raises(DataError, match=meta["filename"]):
        load_data(DataSpec(name=name, root=str(tmp_path), image_size=32))


def test_workers_are_a_number_or_what_the_machine_has():
    assert worker_count(0) == 1
    assert worker_count(5) == 5
    assert 1 <= worker_count("auto") <= 16
