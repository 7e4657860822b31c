"""Evaluation and training mode: set for a block, and restored afterwards."""

from torch import Tensor, nn

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
    assert network[1].told == [False]
    assert [module.training for module in network.modules()] == before == [True, True, True, True, False, False]


def test_a_module_that_is_always_to_evaluate_is_asked_in_its_own_way():
    frozen = nn.BatchNorm1d(2).eval()
    frozen.train = lambda mode=True: frozen  # as users freeze a batch norm
    network = nn.Sequential(frozen, nn.Dropout())
    with evaluating(network, training=True):
        assert network[1].training
        assert not frozen.training
