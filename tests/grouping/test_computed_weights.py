"""Layers whose weight is computed in every call: they are listed, and where they cannot be cut, with the reason."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import passdeploy as pd


def quantisation_aware() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
        from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

        network = nn.Sequential(nn.Conv1d(1, 6, 3), nn.ReLU(), nn.Conv1d(6, 8, 3), nn.Flatten(), nn.Linear(64, 5))
        network.qconfig = get_default_qat_qconfig("x86")
        prepared = prepare_qat(network.train())
        prepared(torch.rand(2, 1, 12))
    return prepared.eval()


def normalised(norm: type) -> nn.Module:
    layers = [norm(nn.Conv1d(1, 6, 3)), nn.ReLU(), norm(nn.Conv1d(6, 8, 3)), nn.Flatten(), nn.Linear(64, 5)]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize(
    "make", [lambda: normalised(weight_norm), lambda: normalised(spectral_norm), quantisation_aware]
)
def test_every_layer_is_in_a_group_and_those_that_stay_say_why(make):
    torch.manual_seed(0)
    network, x = make(), torch.rand(1, 1, 12)
    groups = pd.find_groups(network, x)
    assert [group.width for group in groups] == [6, 8, 5]
    assert all(group.reason for group in groups if not group.is_prunable)
    plan = pd.Plan({group.name: tuple(range(group.width // 2)) for group in groups if group.is_prunable})
    if make is quantisation_aware:  # its observers change with every call
        network.apply(torch.ao.quantization.disable_observer)
    assert pd.verify(network, groups, plan, x, tolerance=1e-5) <= 1e-5


WEIGHT_NORMS = {
    "weight norm": weight_norm,
    "weight norm over inputs": lambda layer: weight_norm(layer, dim=1),
    "spectral norm": spectral_norm,
    "weight norm of old": nn.utils.weight_norm,
    "spectral norm of old": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("name", WEIGHT_NORMS)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_normalised_weight_is_cut_and_trains_on(name: str):
    torch.manual_seed(0)
    norm, x = WEIGHT_NORMS[name], torch.randn(2, 3, 8, 8)
    network = nn.Sequential(
        *(norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), norm(nn.ConvTranspose2d(8, 12, 2)), nn.Sigmoid(), nn.Flatten()),
        *(norm(nn.Linear(12 * 49, 10)), nn.ReLU(), nn.Linear(10, 5)),
    )
    network(x).sum().backward()  # a power iteration, or what a hook leaves behind
    network.eval()
    groups = pd.find_groups(network, x)
    assert [group.is_prunable for group in groups] == [True, True, True, False]
    plan = pd.Plan({group.name: tuple(range(1, group.width, 2)) for group in groups[:3]})
    assert pd.verify(network, groups, plan, x, tolerance=1e-5) <= 1e-5
    smaller, reference = pd.slim(network, groups, plan), pd.masked(network, groups, plan)
    for each in (smaller, reference):
        each(x).square().sum().backward()
    before, after = (dict(each.named_parameters())["0.bias"].grad for each in (reference, smaller))
    assert torch.allclose(before[1::2], after, atol=1e-5)
    assert all(parameter.grad.isfinite().all() for parameter in reference.parameters())


def test_fake_quantisation_says_what_to_do():
    groups = pd.find_groups(quantisation_aware(), torch.rand(1, 1, 12))
    assert all("cut the network first, and prepare the slim one" in group.reason for group in groups[:-1])


def test_the_norm_of_a_weight_that_is_computed_protects_its_channels():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.direction, self.magnitude = nn.Parameter(torch.randn(8, 3, 1)), nn.Parameter(torch.ones(8, 1, 1))
            self.head = nn.Conv1d(8, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = torch._weight_norm(self.direction.tanh(), self.magnitude, 0)
            return self.head(nn.functional.conv1d(x, weight).relu()).mean(2)

    groups = pd.find_groups(Normed().eval(), torch.rand(1, 3, 12))
    assert not any(group.is_prunable for group in groups)
