"""Fixtures of several test files: a small folder of images and a recipe that runs in seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

RECIPE = """
version: 1
name: tiny
model: {{name: passdeploy/resnet20_cifar}}
data: {{name: imagefolder, root: {root}, image_size: 16, batch_size: 16}}
train: {{epochs: 2, optimizer: {{lr: 0.05}}}}
prune: {{target: {{macs: 0.6}}, round_to: 1, steps: 6, prompt: {{size: 2}}, hypernet: {{hidden: 8}}}}
finetune: {{epochs: 2}}
gates: {{top1_drop: null}}
"""


def write_image_folder(root: Path, *, classes: int = 2, images: int = 24, size: int = 16) -> Path:
    """Write a folder of noisy images; each class is bright in another colour channel."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", images), ("test", images // 3)):
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = torch.randint(0, 120, (3, size, size), generator=generator, dtype=torch.uint8)
                image[label] += 100
                to_pil_image(image).save(folder / f"{number:03d}.png")
    return root


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep latency tables of tests apart from those of the user."""
    before = os.environ.get("PASSDEPLOY_CACHE")
    os.environ["PASSDEPLOY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("PASSDEPLOY_CACHE")
    if before is not None:
        os.environ["PASSDEPLOY_CACHE"] = before


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE.format(root=image_folder))
    return path
