"""Random changes by torchvision's transforms: a function of (seed, epoch, position), and what their names say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.transforms import v2

from passdeploy.data import transforms
from passdeploy.data.feeding import DeviceFeed
from passdeploy.data.splits import ImageData, load_data
from passdeploy.data.transforms import _OPERATION_NAMES, DRAWS, BatchTransforms
from passdeploy.errors import RecipeError
from passdeploy.recipe import AugmentationSpec, DataSpec, RandAugmentSpec, TrainSpec, parse_recipe
from tests.device_reads import DeviceReads

EVERYTHING = AugmentationSpec(crop=0.35, colour=0.4, randaugment=RandAugmentSpec(ops=3, magnitude=20), erase=0.5)


@pytest.fixture(scope="module")
def data() -> ImageData:
    data = load_data(DataSpec(name="digits", image_size=16))
    return replace(data, train=data.train.subset(torch.arange(0, 1438, 10)))  # type: ignore[attr-defined]


def epoch_of(data: ImageData, size: int, **options: object) -> Tensor:
    batches = data.train.batches(size, epoch=3, seed=1, augment=EVERYTHING, **options)  # type: ignore[arg-type]
    return torch.cat([images for images, _ in batches])


def changed(images: Tensor, draws: dict[int, float] | None = None, **keys: object) -> Tensor:
    """Change images with draws of 0.5, but for those given."""
    numbers = torch.full((len(images), DRAWS), 0.5, dtype=torch.float64)
    for place, value in (draws or {}).items():
        numbers[:, place] = value
    return BatchTransforms(AugmentationSpec.model_validate({"flip": 0.0, **keys}), numbers).apply(images)


@pytest.fixture
def noise() -> Tensor:
    return torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_changes_do_not_depend_on_batches_or_on_what_was_drawn_before(data: ImageData):
    state = torch.get_rng_state()
    whole = epoch_of(data, 500)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(epoch_of(data, 17), whole)
    halves = [torch.cat([images for images, _ in _part(data, index)]) for index in (0, 1)]
    batches = whole.split(30)
    assert torch.equal(halves[1], torch.cat([batch.tensor_split(2)[1] for batch in batches]))
    other = torch.cat([images for images, _ in data.train.batches(500, epoch=4, seed=1, augment=EVERYTHING)])
    assert not torch.equal(other, whole)


def _part(data: ImageData, index: int):
    return data.train.batches(30, epoch=3, seed=1, augment=EVERYTHING, part=(index, 2))


def test_a_feed_of_a_device_makes_the_same_changes(data: ImageData, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("passdeploy.data.splits.is_fed", lambda device: True)
    monkeypatch.setattr(DeviceFeed, "_fits", lambda feed: True)
    for _ in range(2):  # the second time all images are on the device
        assert torch.equal(epoch_of(data, 200, device=torch.device("cpu")), epoch_of(data, 200))


def test_each_change_is_what_its_name_says(noise: Tensor):
    assert torch.equal(changed(noise, flip=1.0), noise.flip(3))
    assert torch.equal(changed(noise, {4: 0.3}, flip=0.25, erase=0.1), noise)
    boxes = changed(noise, erase=1.0)
    share = (boxes == 0).all(1).float().mean()
    assert 0.05 < share < 0.33
    assert torch.equal(boxes[boxes != 0], noise[boxes != 0])
    whole = changed(noise, {0: 1.0, 1: 0.5}, crop=0.5)
    assert torch.equal(whole, noise)
    quarter = changed(noise, {0: 0.0, 2: 0.0, 3: 0.0}, crop=0.25)
    expected = v2.functional.resize(noise[:, :, :8, :8], [16, 16], antialias=True)
    assert torch.equal(quarter, expected)
    assert torch.equal(changed(noise, colour=0.5), noise)  # draws of one half change nothing
    darker = changed(noise, {5: 0.0}, colour=0.5)
    assert torch.equal(darker, v2.functional.adjust_brightness(noise, 0.5))


def test_operations_of_randaugment_are_those_of_torchvision():
    image = torch.randint(0, 256, (3, 331, 331), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = v2.RandAugment()
    names = {
        "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX", "translate_y": "TranslateY",
        "rotate": "Rotate", "brightness": "Brightness", "colour": "Color", "contrast": "Contrast",
        "sharpness": "Sharpness", "posterize": "Posterize", "solarize": "Solarize", "autocontrast": "AutoContrast",
        "equalize": "Equalize", "identity": "Identity",
    }  # fmt: skip
    assert set(names) == set(_OPERATION_NAMES)
    assert set(names.values()) == set(theirs._AUGMENTATION_SPACE)
    for ours, name in names.items():
        magnitudes, is_signed = theirs._AUGMENTATION_SPACE[name]
        strengths = magnitudes(31, 331, 331)
        for sign in (-1, 1) if is_signed else (1,):
            magnitude = 0.0 if strengths is None else float(strengths[9]) * sign
            mode, fill = v2.InterpolationMode.NEAREST, {}
            expected = theirs._apply_image_or_video_transform(image, name, magnitude, mode, fill)
            draws = {8: (_OPERATION_NAMES.index(ours) + 0.5) / len(names), 9: 0.25 if sign < 0 else 0.75}
            (found,) = changed(image[None], draws, randaugment={"ops": 1, "magnitude": 9})
            assert found.shape == expected.shape
            if not ours.startswith("shear"):  # theirs shears around a corner, ours around the middle
                assert (found.int() - expected.int()).abs().max() <= 1, ours


class _MadeOnDevice(TorchFunctionMode):
    """Count the tensors that are made of values on a device, which makes the host wait for the device."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.tensor, torch.as_tensor) and "device" in (kwargs or {})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", _OPERATION_NAMES)
def test_no_change_makes_the_host_wait_for_the_device(name: str, noise: Tensor, monkeypatch: pytest.MonkeyPatch):
    with DeviceReads([noise]) as reads, _MadeOnDevice() as made:
        monkeypatch.setattr(transforms, "to_device", lambda tensor, device: reads.put_on_device(tensor.clone()))
        draws = dict.fromkeys(range(DRAWS), 0.3) | {8: (_OPERATION_NAMES.index(name) + 0.5) / 14}
        images = changed(noise, draws, crop=0.3, flip=1.0, colour=0.4, erase=1.0, randaugment={"ops": 1})
    assert reads.is_on_device(images)
    assert (reads.reads, made.count) == ([], 0)


def test_recipes_say_which_changes():
    text = {"version": 1, "model": {"name": "timm/resnet18"}, "data": {"name": "digits"}}
    spec = {"crop": 0.35, "randaugment": {"magnitude": 5}}
    recipe = parse_recipe(json.dumps({**text, "train": {"augmentation": spec}}), "r.yaml")
    assert isinstance(recipe.train.random_changes, AugmentationSpec)
    assert recipe.finetune.random_changes is True
    assert TrainSpec(augment="none").random_changes is False
    for wrong, message in (
        ({"augmentation": {"flip": 0.0}}, "changes nothing"),
        ({"augmentation": {}, "augment": "none"}, "augment is none"),
        ({"augmentation": {"flop": 1}}, "flop"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe(json.dumps({**text, "train": wrong}), "r.yaml")
