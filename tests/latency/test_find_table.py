from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from passdeploy.errors import UsageError
from passdeploy.grouping.find import map_channels
from passdeploy.latency import find_table as module
from passdeploy.latency.find_table import find_table
from passdeploy.latency.measurement_context import UNKNOWN_CPU, MeasurementContext
from passdeploy.latency.table import LatencyTable
from tests.latency.fakes import QUICK, SteadySampler

IMAGES = torch.zeros(2, 3, 8, 8)


def network(activation: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3), activation, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)
    ).eval()


def context(backend: str) -> MeasurementContext:
    return MeasurementContext.here(backend=backend, threads=1, batch=2, image_shape=(3, 8, 8))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PASSDEPLOY_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "make_sampler", lambda _, dense, channels, images, **__: SteadySampler(channels))
    return tmp_path


def find(model: nn.Module, backend: str = "torch") -> LatencyTable:
    return find_table(context(backend), model, map_channels(model, IMAGES[:1]), IMAGES, plan=QUICK)


def test_networks_that_differ_only_in_an_activation_share_no_table(own_cache: Path):
    relu, again, silu = find(network(nn.ReLU())), find(network(nn.ReLU())), find(network(nn.SiLU()))
    assert len(list(own_cache.iterdir())) == 2
    assert relu.modules == again.modules != silu.modules


def test_a_graph_of_another_exporter_has_a_table_of_its_own(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    versions = {"onnxscript": "1.0", "onnxruntime": "1.0", "torch": "2.10"}
    monkeypatch.setattr(module, "package_versions", lambda: versions)
    for backend, tables in (("torch", 1), ("ort", 3)):
        for versions["onnxscript"] in ("1.0", "2.0"):
            find(network(nn.ReLU()), backend)
        assert len(list(own_cache.iterdir())) == tables


@pytest.mark.parametrize(("processor", "measured"), [("Imaginary CPU", 1), (UNKNOWN_CPU, 2)])
def test_no_table_in_the_cache_is_taken_for_one_of_an_unknown_processor(
    processor: str, measured: int, monkeypatch: pytest.MonkeyPatch
):
    model, made = network(nn.ReLU()), list[SteadySampler]()
    channels = map_channels(model, IMAGES[:1])

    def make(*_: object, **__: object) -> SteadySampler:
        made.append(SteadySampler(channels))
        return made[-1]

    monkeypatch.setattr(module, "make_sampler", make)
    for _ in range(2):
        find_table(replace(context("torch"), processor=processor), model, channels, IMAGES, plan=QUICK)
    assert len(made) == measured


def test_a_network_that_cannot_be_cut_has_no_table():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with pytest.raises(UsageError, match=r"^nothing of Sequential can be cut: the model's output\.$"):
        find(model.eval())
