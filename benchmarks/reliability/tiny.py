"""A run that takes half a second: a network of two layers, 48 images of 16 pixels, every stage of `passdeploy prune`.

Two things of a real run are left out, since they take most of its time and change nothing that is compared: the
latencies that are measured at its end, and the syncing of files to disk (a killed process leaves what it wrote to the
system). Training and mask learning save their state after every step instead of every minute.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

from torch import nn

from passdeploy.errors import PassDeployError
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.numbering import list_runs
from passdeploy.runtime.files import sha256_of
from tests.conftest import write_image_folder

RECIPE = """\
version: 1
name: tiny
model: {{name: "benchmarks.reliability.tiny:two_layers"}}
data: {{name: imagefolder, root: {root}, image_size: 16, batch_size: 16, workers: 1}}
train: {{epochs: 3, optimizer: {{lr: 0.05}}}}
prune: {{target: {{macs: 0.6}}, round_to: 1, steps: 8, prompt: {{size: 2}}, hypernet: {{hidden: 8}}}}
finetune: {{epochs: 3}}
gates: {{top1_drop: null}}
"""
RESULTS = ("dense.safetensors", "plan.json", "scores.safetensors", "slim.safetensors")  # compared byte by byte


def two_layers(num_classes: int = 10) -> nn.Module:
    """Build the network: a convolution and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def write_recipe(folder: Path) -> Path:
    """Write the images and the recipe into a folder, and return the recipe's path."""
    root = write_image_folder(folder / "images")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(root=root))
    return path


@contextmanager
def shortened() -> Iterator[None]:
    """Leave out latencies at the end and the syncing of files; save after every step, measure tables coarsely."""
    from passdeploy.commands import stages
    from passdeploy.latency import find_table
    from passdeploy.latency.sampling import SamplingPlan
    from passdeploy.runtime import files
    from passdeploy.training import saving

    with (
        patch.object(stages.PruneJob, "_latency_rows", lambda _: []),
        patch.object(files, "_sync", lambda _: None),
        patch.object(saving, "EVERY_S", 0.0),
        patch.object(saving, "_LARGEST_SHARE", float("inf")),
        patch.object(find_table, "DEFAULT_SAMPLING", SamplingPlan(networks=8, repeats=1, seconds=0.01)),
        patch.dict(os.environ, {"NO_COLOR": "1"}),
    ):
        yield


def prune_arguments(recipe: Path, out: Path, *options: str) -> list[str]:
    """Return the arguments of `passdeploy` for a run of the recipe on the CPU."""
    return ["prune", str(recipe), "--out", str(out), "--allow-code", "--device", "cpu", *options]


def can_go_on(out: Path) -> bool:
    """Test whether there is a run that has begun, which `--resume` goes on with."""
    for run in list_runs(out):
        with suppress(PassDeployError):
            if RunFolder.open(run).has("recipe.resolved.yaml"):
                return True
    return False


def hashes_of(run: Path) -> dict[str, str]:
    """Return the SHA-256 of the files that two equal runs have in common."""
    return {name: sha256_of(run / name) for name in RESULTS}
