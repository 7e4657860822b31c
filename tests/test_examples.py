"""Tests that the examples run, with fewer steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "options", "printed"),
    [
        ("own_loop.py", ("--epochs", "2"), "epoch 1: loss "),
        ("segmentation.py", ("--steps", "2"), "equal to the masked network to "),
    ],
)
def test_an_example_runs(name: str, options: tuple[str, ...], printed: str):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *options], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"own_loop.py", "segmentation.py"}
