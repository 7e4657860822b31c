"""Evaluation and training mode: set for a block, and restored afterwards."""

import pytest
import torch
from torch import Tensor, nn

import passdeploy as pd
from passdeploy.errors import UsageError
from passdeploy.models.modes import evaluating


class Caching(nn.Module):
    """A module that overrides `train`, as modules with a cache for evaluation do, and records the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.told = nn.BatchNorm1d(2), []

    def train(self, mode: bool = True) -> "Caching":
        self.told.append(mode)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_every_module_evaluates_and_goes_back_to_its_mode():
    network = nn.Sequential(nn.Linear(2, 2), Caching(), nn.Sequential(nn.Dropout()))
    network[2].eval()
    before = [module.training for module in network.modules()]
    network[1].told.clear()
    with evaluating(network):
        assert not any(module.training for module in network.modules())
    assert network[1].told == [False, True]
    assert [module.training for module in network.modules()] == before == [True, True, True, True, False, False]


def test_a_module_that_is_always_to_evaluate_is_asked_in_its_own_way():
    frozen = nn.BatchNorm1d(2).eval()
    frozen.train = lambda mode=True: frozen  # as users freeze a batch norm
    network = nn.Sequential(frozen, nn.Dropout())
    with evaluating(network, training=True):
        assert network[1].training
        assert not frozen.training


class Merging(nn.Linear):
    """A linear layer with an adapter of rank two, which it merges into its weight for evaluation, as LoRA does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.is_merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if mode == self.is_merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).detach()
            self.is_merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0 if self.is_merged else x @ self.down.T @ self.up.T)


def test_what_a_module_did_for_evaluation_it_undoes():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), Merging(8 * 36, 5)).train()
    before = network[3].weight.detach().clone()
    pd.find_groups(network, torch.zeros(1, 3, 8, 8))
    assert network[3].training
    assert not network[3].is_merged
    torch.testing.assert_close(network[3].weight, before)


def test_in_inference_mode_networks_are_followed_and_cut_as_elsewhere():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.LayerNorm([6, 6]), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    )
    network, images = network.eval(), torch.randn(2, 3, 8, 8)
    groups, counts = pd.find_groups(network, images), pd.count(network, images)
    with torch.inference_mode():
        found = pd.find_groups(network, images)
        assert [(one.name, one.is_prunable) for one in found] == [(one.name, one.is_prunable) for one in groups]
        assert pd.count(network, images) == counts
        plan = pd.Plan({"0": (0, 1, 2)})
        assert pd.verify(network, found, plan, images, tolerance=1e-5) <= 1e-5
        smaller = pd.slim(network, found, plan)
        assert torch.is_inference_mode_enabled()
    smaller(images).sum().backward()  # it can be trained
    assert counts.macs > 0


@pytest.mark.parametrize("inputs", [{"input": torch.zeros(1, 3, 8, 8)}, torch.zeros(1, 3, 8, 8).numpy(), None])
def test_inputs_that_are_no_arguments_are_refused(inputs: object):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)).eval()
    for use in (pd.find_groups, pd.count):
        with pytest.raises(UsageError, match="example inputs cannot be of type"):
            use(network, inputs)
