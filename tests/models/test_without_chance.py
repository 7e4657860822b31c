"""Networks in training mode without chance: two calls give the same, whatever they draw."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.models.without_chance import without_chance

X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


def attention(x: Tensor) -> Tensor:
    torch.manual_seed(1)
    layer = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).train()
    torch.seed()
    return layer(x, x, x)[0]


def lstm(x: Tensor) -> Tensor:
    torch.manual_seed(1)
    layer = nn.LSTM(8, 8, 2, dropout=0.5).train()
    torch.seed()
    return layer(x)[0]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.dropout(x, 0.5, True),
        lambda x: F.alpha_dropout(x, 0.5, True),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        lambda x: F.rrelu(x, training=True),
        lambda x: F.gumbel_softmax(x),
        lambda x: x + torch.rand_like(x) + torch.randn(8) + torch.randint(3, 9, (8,)),
        lambda x: x[torch.randperm(2)],
        lambda x: torch.multinomial(x.abs()[0], 2).float(),
        attention,
        lstm,
    ],
)
def test_two_calls_give_the_same(call: Callable[[Tensor], Tensor]):
    with torch.no_grad(), without_chance():
        one, two = call(X), call(X)
    assert torch.equal(one, two)
    assert one.isfinite().all()


def test_dropout_keeps_every_value_in_proportion():
    with torch.no_grad(), without_chance():
        torch.testing.assert_close(F.dropout(X, 0.5, True), 2 * X)


def test_whole_numbers_are_the_lowest():
    with without_chance():
        assert torch.randint(3, 9, (4,)).tolist() == [3] * 4


def draw_until_one_is_kept() -> None:
    while not (torch.rand(3) > 0.5).any():
        pass


def test_code_that_draws_until_chance_helps_comes_to_an_end():
    with pytest.raises(RuntimeError, match="which are all the same here"), without_chance():
        draw_until_one_is_kept()
