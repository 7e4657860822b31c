"""A network that a run folder cannot rebuild from a name and tensors is refused before it is trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from passdeploy.commands.prepare import build_dense
from passdeploy.commands.rebuildable import require_rebuildable
from passdeploy.errors import ModelError
from passdeploy.recipe import Recipe, parse_recipe
from passdeploy.runs.load import rebuild_dense

HEAD = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, scale=1.0, noise=None):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        self.scale = scale
        self.noise = noise
    def forward(self, images):
        logits = self.layers(self.scale * images)
        return logits if self.noise is None else logits + self.noise
"""
IMAGE = torch.zeros(1, 3, 16, 16)


def recipe(weights: str | None, name: str = "mine:net") -> Recipe:
    document = {"version": 1, "model": {"name": name, "weights": weights}, "data": {"name": "digits"}, "seed": 5}
    return parse_recipe(json.dumps(document), "r.yaml")


def check(folder: Path, monkeypatch: pytest.MonkeyPatch, factory: str, weights: str | None) -> None:
    """Build the network of a factory, and check that it can be rebuilt."""
    (folder / "mine.py").write_text(f"{HEAD}\n{factory}\n")
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    asked = recipe(weights)
    dense = build_dense(asked, 2, allow_code=True)
    require_rebuildable(dense, asked, image=IMAGE, num_classes=2, allow_code=True)


@pytest.mark.parametrize(
    ("factory", "weights"),
    [
        ("def net(): return Net()", None),
        ("def net(pretrained=False): return Net()", "pretrained"),
        ("def net(): return Net(noise=torch.randn(2))", None),  # random, but by the recipe's seed
    ],
)
def test_networks_that_are_the_same_in_every_call_pass(tmp_path, monkeypatch, factory, weights):
    check(tmp_path, monkeypatch, factory, weights)


@pytest.mark.parametrize(
    ("factory", "weights", "problem"),
    [
        ("def net(pretrained=False): return Net(scale=2.0 if pretrained else 1.0)", "pretrained", "its answers differ"),
        ("calls = []\ndef net(): calls.append(1); return Net(scale=float(len(calls)))", None, "its answers differ"),
        ("def net(pretrained=False): return Net() if pretrained else nn.Flatten()", "pretrained", "it fails"),
    ],
)
def test_networks_that_differ_in_another_call_are_refused(tmp_path, monkeypatch, factory, weights, problem):
    with pytest.raises(ModelError, match=f"mine:net cannot be rebuilt from its tensors.*{problem}"):
        check(tmp_path, monkeypatch, factory, weights)


def test_a_run_of_pretrained_googlenet_keeps_the_change_of_its_input():
    rebuilt = [
        rebuild_dense(recipe(weights, "torchvision/googlenet"), 2, allow_code=False) for weights in ("pretrained", None)
    ]
    assert [network.transform_input for network in rebuilt] == [True, False]


def test_a_network_by_name_is_not_built_again(monkeypatch):
    monkeypatch.setattr("passdeploy.commands.rebuildable.rebuild_dense", None)  # a call would fail
    require_rebuildable(
        nn.Flatten(), recipe(None, "torchvision/resnet18"), image=IMAGE, num_classes=2, allow_code=False
    )
