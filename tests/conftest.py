"""Fixtures of several test files: a small folder of images and a recipe that runs in seconds."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from passdeploy.commands import prune
from tests.short_measurements import shorten_measurements

RECIPE = """
version: 1
name: tiny
model: {{name: passdeploy/resnet8_cifar}}
data: {{name: imagefolder, root: {root}, image_size: 16, batch_size: 16}}
train: {{epochs: 2, optimizer: {{lr: 0.05}}}}
prune: {{target: {{macs: 0.6}}, round_to: 1, steps: 6, anneal: 0.9, prompt: {{size: 2}}, hypernet: {{hidden: 8}}}}
finetune: {{epochs: 2}}
gates: {{top1_drop: null}}
"""
COVERED = tuple(f"tests/{package}/" for package in ("channels", "grouping", "slimming", "tracing"))


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count the lines that the tests of `COVERED` run, and those of no other test, since counting takes time."""
    for item in items:
        if not item.nodeid.startswith(COVERED) or "random_networks" in item.nodeid:
            item.add_marker("no_cover")


def pytest_configure() -> None:
    """Hear of SIGINT, which a shell lets programs in the background ignore: tests send it to themselves."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Start every test, and fixtures that are first asked for by it, from the same weights, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep latency tables of tests apart from those of the user."""
    before = os.environ.get("PASSDEPLOY_CACHE")
    os.environ["PASSDEPLOY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("PASSDEPLOY_CACHE")
    if before is not None:
        os.environ["PASSDEPLOY_CACHE"] = before


@pytest.fixture(autouse=True, scope="session")
def operators_are_read_once() -> Iterator[None]:
    """Cache the operator table of torch's exporter, which otherwise parses 500 translations in each export (0.5 s).

    With a version of torch that is built differently, the cache is left out and nothing else changes.
    """
    apis = getattr(import_module("torch.onnx._internal.exporter._registration"), "onnxscript_apis", None)
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(apis, "get_torchlib_ops"):
            patch.setattr(apis, "get_torchlib_ops", cache(apis.get_torchlib_ops))
        gc.freeze()  # imported modules are never garbage, and scanning them takes a sixth of an export
        yield
        gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def short_measurements() -> Iterator[None]:
    """Measure for a moment; see `shorten_measurements`."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_measurements(patch)
        yield


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE.format(root=image_folder))
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> prune.RunResult:
    """Run the recipe once, for tests that only read the run; those that write copy it with `copy_run`."""
    return prune.run(tiny_recipe, out=tmp_path_factory.mktemp("runs"))


def copy_run(run: prune.RunResult, folder: Path) -> Path:
    """Copy a run that nobody exported yet, as the newest of `folder`/runs."""
    copied = folder / "runs" / run.path.name
    shutil.copytree(run.path, copied, ignore=shutil.ignore_patterns(".lock", "export"))
    (folder / "runs" / "latest").symlink_to(copied.name)
    return copied
