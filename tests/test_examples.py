"""Tests that the examples run, with fewer steps."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = {
    "own_loop.py": (("--epochs", "2"), "epoch 1: loss "),
    "segmentation.py": (("--steps", "2"), "equal to the masked network to "),
    "torchvision_detection.py": (("--steps", "2"), "shapes found: dense "),
    "hf_segformer.py": (("--steps", "2"), "pixels right: dense "),
    "yolo.py": (("--images", "8", "--epochs", "1", "--steps", "2"), "mAP50: dense "),
}
PACKAGES = {"hf_segformer.py": ("transformers", "accelerate"), "yolo.py": ("ultralytics",)}  # that are no dependencies


@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs(name: str, tmp_path: Path):
    if missing := [package for package in PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    options, printed = RUNS[name]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == RUNS.keys()
