"""The settings of `accuracy.py`: dense networks, the data they are pruned on, and the training that all get."""

from __future__ import annotations

import argparse
import copy
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelMap
from passdeploy.data.splits import ImageData, load_data
from passdeploy.grouping.find import map_channels
from passdeploy.models.build import build_model
from passdeploy.models.classifier import replace_classifier_
from passdeploy.recipe import DataSpec, FinetuneOptimizerSpec, FinetuneSpec, OptimizerSpec, TrainSpec
from passdeploy.runtime.seeds import seed_of
from passdeploy.training.evaluate import evaluate
from passdeploy.training.loop import fit

BATCH = 32
DENSE_BATCH = 64
DENSE_FACTOR = 16  # steps of training a dense network in a transfer setting for one of fine-tuning a pruned one
DENSE_TRAINING = TrainSpec(epochs=1, warmup_epochs=0.05, optimizer=OptimizerSpec(lr=0.1))
TRAINING = FinetuneSpec(epochs=1, warmup_epochs=0.1, optimizer=FinetuneOptimizerSpec(lr=0.01))


@dataclass(frozen=True)
class Size:
    """How much work a form of the benchmark is."""

    mask_steps: int
    finetune_steps: int
    test_images: int | None  # None: all
    seeds: tuple[int, ...]
    shares: tuple[float, ...]
    settings: tuple[str, ...]


class Steps:
    """The first batches of one epoch of a split: a training of so many steps; more than an epoch starts another."""

    def __init__(self, split: Any, steps: int, batch: int) -> None:
        self._split, self._steps, self._batch, self.num_classes = split, steps, batch, split.num_classes

    def __len__(self) -> int:
        return self._steps * self._batch

    def batches(self, batch_size: int, *, epoch: int = 0, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(_endless(self._split, batch_size, **options), self._steps)


class First:
    """The first images of a split in a shuffled order, the same for everyone."""

    def __init__(self, split: Any, images: int) -> None:
        self._split, self._images, self.num_classes = split, min(images, len(split)), split.num_classes

    def __len__(self) -> int:
        return self._images

    def batches(self, batch_size: int, **_: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(self._split.batches(batch_size, epoch=0), -(-self._images // batch_size))


class Remembering(nn.Module):
    """A teacher that answers from memory about images it has seen: every method of a seed shows it the same."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher, self._answers = teacher, {}

    def forward(self, images: Tensor) -> Tensor:
        key = hashlib.sha256(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes()).digest()
        if key not in self._answers:
            self._answers[key] = self.teacher(images)
        return self._answers[key]


@dataclass
class Setting:
    """A dense network on its data."""

    name: str
    dense: nn.Module
    data: ImageData
    top1: float
    channels: ChannelMap
    teacher: nn.Module | None = None

    @classmethod
    def of(cls, name: str, dense: nn.Module, data: ImageData) -> Setting:
        """With its groups and its accuracy."""
        channels = map_channels(dense, torch.zeros(1, *data.image_shape))
        return cls(name, dense, data, evaluate(dense, data.test, batch_size=256).top1, channels, Remembering(dense))

    @property
    def batch(self) -> int:
        return min(BATCH, len(self.data.train) // 8)

    def stream(self, purpose: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches without end, in the memory order that networks train in."""
        for images, labels in _endless(self.data.train, self.batch, seed=seed_of(purpose, seed), augment=True):
            yield images.to(memory_format=torch.channels_last), labels


def train_(model: nn.Module, setting: Setting, steps: int, seed: int, *, teacher: nn.Module | None) -> None:
    """The one training that dense networks, PASS and baselines get."""
    part = replace(setting.data, train=Steps(setting.data.train, steps, setting.batch))
    fit(model, part, TRAINING, batch_size=setting.batch, seed=seed, device="cpu", teacher=teacher)


def train_dense(network: nn.Module, data: ImageData, weights: Path, *, steps: int) -> None:
    """Train a network from nothing, and keep what it learned in `weights`."""
    network.to(memory_format=torch.channels_last)
    part = replace(data, train=Steps(data.train, steps, DENSE_BATCH))
    fit(network, part, DENSE_TRAINING, batch_size=DENSE_BATCH, seed=0, device="cpu")
    _save(network, weights)


def _save(network: nn.Module, weights: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(tensors, weights)


def _home(asked: argparse.Namespace, size: Size) -> Setting:
    data = _images(asked.cifar, size)
    return Setting.of(
        "home", build_model("passdeploy/resnet20_cifar", num_classes=10, weights=str(asked.weights)), data
    )


def _signs(asked: argparse.Namespace, size: Size) -> Setting:
    if asked.signs is None:
        sys.exit("the setting signs needs --signs FOLDER; leave it out with --settings home,halves")
    dense = build_model("passdeploy/resnet20_cifar", num_classes=10, weights=str(asked.weights))
    return _adapted("signs", asked.weights, dense, 10, _images(asked.signs, size), size)


def _halves(asked: argparse.Namespace, size: Size) -> Setting:
    first, second = (_only(_images(asked.cifar, replace(size, test_images=None)), low, low + 5) for low in (0, 5))
    model = "passdeploy/resnet20_cifar"
    weights = asked.weights.with_name(f"resnet20-first-half-{15 * size.finetune_steps}.safetensors")
    if not weights.is_file():
        train_dense(build_model(model, num_classes=5), first, weights, steps=15 * size.finetune_steps)
    return _adapted("halves", asked.weights, build_model(model, num_classes=5, weights=str(weights)), 5, second, size)


def _adapted(name: str, weights: Path, dense: nn.Module, classes: int, data: ImageData, size: Size) -> Setting:
    """The network with a new head, trained on the data it will be pruned on; kept beside `weights` once it is.

    As long as a user would train it. A network trained briefly is what pruned ones end above: then every method
    reaches "dense", and half of what is measured is who trains most while it prunes (`results/accuracy-trials.md`).
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        replace_classifier_(dense, old_classes=classes, num_classes=data.num_classes)
    steps = DENSE_FACTOR * size.finetune_steps
    trained = weights.with_name(f"resnet20-{name}-{steps}.safetensors")
    if not trained.is_file():
        before = Setting(name, dense, data, 0.0, map_channels(dense, torch.zeros(1, *data.image_shape)))
        train_(dense, before, steps, 0, teacher=None)
        _save(dense, trained)
    dense.load_state_dict(safetensors.torch.load_file(trained))
    return Setting.of(name, dense.to(memory_format=torch.contiguous_format).eval(), data)


SETTINGS = {"home": _home, "signs": _signs, "halves": _halves}


def _images(root: Path, size: Size) -> ImageData:
    """Decoded once, kept in memory as uint8."""
    data = load_data(DataSpec(name="imagefolder", root=str(root), image_size=32, batch_size=BATCH))
    return data if size.test_images is None else replace(data, test=First(data.test, size.test_images))


def _only(data: ImageData, low: int, high: int) -> ImageData:
    """The classes from `low` up to `high`, renumbered from 0."""
    return replace(
        data, classes=data.classes[low:high], train=_keep(data.train, low, high), test=_keep(data.test, low, high)
    )


def _keep(split: Any, low: int, high: int) -> Any:
    part = copy.copy(split)
    chosen = ((split.labels >= low) & (split.labels < high)).nonzero().flatten()
    part.labels, part._held, part.num_classes = split.labels[chosen] - low, split._held[chosen], high - low
    return part


def _endless(split: Any, batch: int, *, seed: int, augment: bool, **_: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in count():
        yield from split.batches(batch, epoch=epoch, seed=seed, augment=augment, drop_last=True)
