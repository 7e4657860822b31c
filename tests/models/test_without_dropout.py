"""Dropout, and what is merely called so, in training mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.models.modes import evaluating
from passdeploy.models.without_dropout import without_dropout

X = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))


class DropPath(nn.Module):
    """As it is copied into many repositories."""

    def __init__(self, drop_prob: float = 0.5) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        return x / keep * (keep + torch.rand((len(x),) + (1,) * (x.ndim - 1))).floor()


class DropBlock(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = 1 - F.max_pool2d((torch.rand(len(x), 1, *x.shape[2:]) < 0.1).float(), 3, 1, 1)
        return x * kept * kept.numel() / kept.sum()


class DropsByFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout2d(F.dropout(x, 0.5, self.training), 0.5, self.training)


class GaussianDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * torch.randn_like(x)) if self.training else x


class CentringDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training) - x.mean(1, keepdim=True) if self.training else x


class StrongestDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x.mean(1, keepdim=True) < x.mean(1).amax()) if self.training else x


class DropoutOfEight(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(8).view(8, 1, 1) > 0.5) if self.training else x


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        chance = 0.5 if self.training else 0.0
        own = F.scaled_dot_product_attention(tokens, tokens, tokens, None, chance)
        return own + self.attention(tokens, tokens, tokens)[0]


def differs_by_chance(network: nn.Module) -> bool:
    with evaluating(network, training=True), without_dropout(network):
        return len({network(X).sum().item() for _ in range(4)}) > 1


@pytest.mark.parametrize(
    "drop", [nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), DropPath(), DropPath(0.0), Attention()]
)
def test_dropout_is_off(drop: nn.Module):
    network = nn.Sequential(drop, nn.Identity())
    with evaluating(network):
        expected = network(X)
    with evaluating(network, training=True), without_dropout(network):
        torch.testing.assert_close(network(X), expected)
    assert network.training
    assert drop.training


@pytest.mark.parametrize("drop", [DropBlock(), DropsByFunction()])
def test_layers_with_code_of_their_own_that_drop_are_off(drop: nn.Module):
    assert not differs_by_chance(nn.Sequential(drop))


@pytest.mark.parametrize("drop", [GaussianDropout(), DropoutOfEight()])
def test_what_draws_otherwise_stays_on(drop: nn.Module):
    assert differs_by_chance(nn.Sequential(drop))


@pytest.mark.parametrize("drop", [CentringDropout(), StrongestDropout()])
def test_what_looks_at_other_channels_stays_on(drop: nn.Module):
    network = nn.Sequential(drop)
    with evaluating(network, training=True), without_dropout(network):
        assert not torch.equal(network(X), X)
