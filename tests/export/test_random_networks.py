"""Tests that the ONNX files of random networks compute what the networks do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from tests.exported_networks import export_and_compare
from tests.random_networks import Network, network_of_seed


def parts_of(described: object) -> set[str]:
    """Collect the kinds of layers of a description, at any depth, each with every option that is a word or a switch."""
    if isinstance(described, tuple):
        return set().union(*map(parts_of, described))
    if not is_dataclass(described):
        return set()
    values = {field.name: getattr(described, field.name) for field in fields(described)}
    words = {f"{name}={value}" for name, value in values.items() if isinstance(value, (bool, str))}
    kind = type(described).__name__
    return {kind, *(f"{kind}.{word}" for word in words)}.union(*map(parts_of, values.values()))


def few_networks(seeds: Sequence[int]) -> dict[int, Network]:
    """Choose networks that have every part that any network of these seeds has, those with the most new parts first."""
    networks = {seed: network_of_seed(seed, traits=()) for seed in seeds}
    parts = {seed: parts_of(network) for seed, network in networks.items()}
    chosen, missing = {}, set().union(*parts.values())
    while missing:
        best = max(seeds, key=lambda seed: len(parts[seed] & missing))
        chosen[best] = networks[best]
        missing -= parts[best]
    return chosen


@pytest.mark.slow
def test_random_networks_are_exported_and_agree(tmp_path: Path):
    networks = few_networks(range(8))
    assert len(networks) >= 6
    for seed, network in networks.items():
        assert export_and_compare(network, seed, tmp_path).max_rel_error < 1e-4, seed
