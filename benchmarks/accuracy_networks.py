"""Dense networks of the benchmarks of accuracy, with their images and the training of those without weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from benchmarks.accuracy_splits import FixedSteps
from passdeploy.data.splits import ImageData, load_data
from passdeploy.models.build import build_model
from passdeploy.recipe import DataSpec, OptimizerSpec, TrainSpec
from passdeploy.training.loop import fit

DENSE_BATCH = 64
DENSE_STEPS = 4000  # of training MobileNetV2
DENSE_TRAINING = TrainSpec(epochs=1, warmup_epochs=0.05, optimizer=OptimizerSpec(lr=0.1))


@dataclass(frozen=True)
class AccuracyNetwork:
    """A network with the size of its images."""

    model: str
    pixels: int
    title: str


ACCURACY_NETWORKS = {
    "resnet20": AccuracyNetwork("passdeploy/resnet20_cifar", 32, "ResNet-20"),
    "mobilenet_v2": AccuracyNetwork("torchvision/mobilenet_v2", 64, "MobileNetV2 (64 pixels)"),
}


def dense_weights(name: str, data: ImageData, resnet20: Path) -> Path:
    """Return the file of a dense network's weights; those that are not given are trained and kept beside them."""
    weights = resnet20 if name == "resnet20" else resnet20.with_name(f"{name}-cifar10.safetensors")
    if not weights.is_file():
        train_dense(build_network(ACCURACY_NETWORKS[name], None), data, weights, steps=DENSE_STEPS)
    return weights


def load_images(root: Path, network: AccuracyNetwork) -> ImageData:
    """Load a folder of images; they are decoded once and kept in memory as uint8."""
    return load_data(DataSpec(name="imagefolder", root=str(root), image_size=network.pixels, batch_size=DENSE_BATCH))


def build_network(network: AccuracyNetwork, weights: Path | None) -> nn.Module:
    """Build a network for ten classes, with random weights where none are given."""
    return build_model(network.model, num_classes=10, weights=None if weights is None else str(weights))


def train_dense(network: nn.Module, data: ImageData, weights: Path, *, steps: int) -> None:
    """Train a network from random weights and write the result to `weights`."""
    network.to(memory_format=torch.channels_last)
    part = replace(data, train=FixedSteps(data.train, steps, DENSE_BATCH))
    fit(network, part, DENSE_TRAINING, batch_size=DENSE_BATCH, seed=0, device="cpu")
    save_weights(network, weights)


def save_weights(network: nn.Module, weights: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(tensors, weights)
