"""Settings of `accuracy.py`: dense networks, the data they are pruned on, and the training that all methods get."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from benchmarks.accuracy_networks import (
    ACCURACY_NETWORKS,
    DENSE_BATCH,
    DENSE_STEPS,
    AccuracyNetwork,
    build_network,
    dense_weights,
    load_images,
    save_weights,
    train_dense,
)
from benchmarks.accuracy_splits import FirstImages, FixedSteps, endless_batches, select_classes
from passdeploy.channels.groups import ChannelMap
from passdeploy.data.splits import ImageData
from passdeploy.grouping.find import map_channels
from passdeploy.models.build import build_model
from passdeploy.models.classifier import replace_classifier_
from passdeploy.recipe import FinetuneOptimizerSpec, FinetuneSpec
from passdeploy.runtime.seeds import seed_of
from passdeploy.training.evaluate import evaluate
from passdeploy.training.loop import fit

BATCH, LR = 32, 0.01
DENSE_FACTOR = 16  # steps of training a dense network in a transfer setting for one of fine-tuning a pruned one
TRAINING = FinetuneSpec(epochs=1, warmup_epochs=0.1, optimizer=FinetuneOptimizerSpec(lr=LR))
FROM_SCRATCH = FinetuneSpec(epochs=1, warmup_epochs=0.05, optimizer=FinetuneOptimizerSpec(lr=0.1))


@dataclass(frozen=True)
class Workload:
    """The numbers of steps and test images, and the seeds, budgets and settings of a benchmark run."""

    mask_steps: int
    finetune_steps: int
    test_images: int | None  # None: all
    seeds: tuple[int, ...]
    shares: tuple[float, ...]
    settings: tuple[str, ...]
    batch: int = BATCH
    lr: float = LR  # of fine-tuning, for all methods, and of the weights that PASS trains along
    network: str = ACCURACY_NETWORKS["resnet20"].title


class CachedTeacher(nn.Module):
    """A teacher that caches its outputs: every method of a seed sees the same images."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher, self.answers = teacher, CachedAnswers()

    def forward(self, images: Tensor) -> Tensor:
        return self.answers.of(images, self.teacher)


class CachedAnswers:
    """Outputs of a teacher by the digest of its images, and the seconds that the cache has saved.

    A copy of the teacher shares them.
    """

    def __init__(self) -> None:
        self._answers, self.seconds_saved = dict[bytes, tuple[Tensor, float]](), 0.0

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedAnswers:
        return self

    def of(self, images: Tensor, teacher: nn.Module) -> Tensor:
        key = hashlib.sha256(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes()).digest()
        if found := self._answers.get(key):
            answer, seconds = found
            self.seconds_saved += seconds
            return answer
        began = perf_counter()
        answer = teacher(images)
        self._answers[key] = answer, perf_counter() - began
        return answer


@dataclass
class AccuracySetting:
    """A dense network with its data, groups and accuracy."""

    name: str
    dense: nn.Module
    data: ImageData
    top1: float
    channels: ChannelMap
    teacher: CachedTeacher | None = None
    most_images: int = BATCH  # in a batch
    dense_images: int = 0  # on which the dense network was trained here, from random weights; 0: elsewhere

    @classmethod
    def of(cls, name: str, dense: nn.Module, data: ImageData, batch: int = BATCH) -> AccuracySetting:
        """Find the groups of a network and evaluate it."""
        channels = map_channels(dense, torch.zeros(1, *data.image_shape))
        top1 = evaluate(dense, data.test, batch_size=256).top1
        return cls(name, dense, data, top1, channels, CachedTeacher(dense), batch)

    @property
    def batch(self) -> int:
        return min(self.most_images, len(self.data.train) // 8)

    def seconds(self) -> float:
        """Return a clock's time, with the seconds that cached answers of the teacher saved: as if there were none."""
        return perf_counter() + (self.teacher.answers.seconds_saved if self.teacher else 0.0)

    def stream(self, purpose: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield training batches endlessly, in the memory format of training (channels-last)."""
        for images, labels in endless_batches(self.data.train, self.batch, seed=seed_of(purpose, seed), augment=True):
            yield images.to(memory_format=torch.channels_last), labels


def train_(
    model: nn.Module,
    setting: AccuracySetting,
    steps: int,
    seed: int,
    *,
    teacher: nn.Module | None,
    spec: FinetuneSpec = TRAINING,
) -> None:
    """Train for a number of steps; dense networks, PASS and baselines all get the same training."""
    part = replace(setting.data, train=FixedSteps(setting.data.train, steps, setting.batch))
    fit(model, part, spec, batch_size=setting.batch, seed=seed, device="cpu", teacher=teacher)


def _home_setting(options: argparse.Namespace, size: Workload) -> AccuracySetting:
    data = _load_images(options.cifar, size)
    dense = build_model("passdeploy/resnet20_cifar", num_classes=10, weights=str(options.weights))
    return AccuracySetting.of("home", dense, data, size.batch)


def _signs_setting(options: argparse.Namespace, size: Workload) -> AccuracySetting:
    if options.signs is None:
        sys.exit("the setting signs needs --signs FOLDER; leave it out with --settings home,halves")
    dense = build_model("passdeploy/resnet20_cifar", num_classes=10, weights=str(options.weights))
    return _transfer_setting("signs", options.weights, dense, 10, _load_images(options.signs, size), size)


def _halves_setting(options: argparse.Namespace, size: Workload) -> AccuracySetting:
    first, second = (
        select_classes(_load_images(options.cifar, replace(size, test_images=None)), low, low + 5) for low in (0, 5)
    )
    model = "passdeploy/resnet20_cifar"
    steps = 15 * size.finetune_steps
    weights = options.weights.with_name(f"resnet20-first-half-{steps}.safetensors")
    if not weights.is_file():
        train_dense(build_model(model, num_classes=5), first, weights, steps=steps)
    dense = build_model(model, num_classes=5, weights=str(weights))
    setting = _transfer_setting("halves", options.weights, dense, 5, second, size)
    return replace(setting, dense_images=steps * DENSE_BATCH + DENSE_FACTOR * size.finetune_steps * setting.batch)


def _transfer_setting(
    name: str, weights: Path, dense: nn.Module, classes: int, data: ImageData, size: Workload
) -> AccuracySetting:
    """Give a network a new head and train it on the data it will be pruned on; the weights are kept beside `weights`.

    It is trained for as long as a user would train it. Pruned networks end above a dense one that was trained briefly;
    then every method reaches the dense accuracy, and the comparison measures mostly the training during pruning
    (`results/accuracy-trials.md`).
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        replace_classifier_(dense, old_classes=classes, num_classes=data.num_classes)
    steps = DENSE_FACTOR * size.finetune_steps
    trained = weights.with_name(f"resnet20-{name}-{steps}.safetensors")
    if not trained.is_file():
        before = AccuracySetting(name, dense, data, 0.0, map_channels(dense, torch.zeros(1, *data.image_shape)))
        train_(dense, before, steps, 0, teacher=None)
        save_weights(dense, trained)
    dense.load_state_dict(safetensors.torch.load_file(trained))
    return AccuracySetting.of(name, dense.to(memory_format=torch.contiguous_format).eval(), data, size.batch)


def _mobilenet_setting(options: argparse.Namespace, size: Workload) -> AccuracySetting:
    network = ACCURACY_NETWORKS["mobilenet_v2"]
    data = _load_images(options.cifar, size, network)
    weights = dense_weights("mobilenet_v2", data, options.weights)
    setting = AccuracySetting.of("mobilenet", build_network(network, weights), data, size.batch)
    return replace(setting, dense_images=DENSE_STEPS * DENSE_BATCH)


SETTINGS = {"home": _home_setting, "signs": _signs_setting, "halves": _halves_setting, "mobilenet": _mobilenet_setting}
TRAINED_HERE = ("halves", "mobilenet")  # from random weights


def _load_images(root: Path, size: Workload, network: AccuracyNetwork = ACCURACY_NETWORKS["resnet20"]) -> ImageData:
    data = load_images(root, network)
    return data if size.test_images is None else replace(data, test=FirstImages(data.test, size.test_images))
