"""Tests that the ONNX files of random networks compute what the networks do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exported_networks import export_and_compare
from tests.random_networks import network_of_seed


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 50, 5))
def test_random_networks_are_exported_and_agree(first: int, tmp_path: Path):
    for seed in range(first, first + 5):
        assert export_and_compare(network_of_seed(seed, traits=()), seed, tmp_path).max_rel_error < 1e-4, seed
