"""Modules in the place of those of a skipped block: what they return, and what they take over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passdeploy.channels.blocks import Replacement
from passdeploy.slimming.substitutes import First, Zero, Zeros, replace_modules_, substitute_of

X = torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("replacement", "expected"),
    [
        (Replacement("a", "identity"), X),
        (Replacement("a", "relu"), X.relu()),
        (Replacement("a", "first"), X),
        (Replacement("a", "zero", ndim=3), torch.zeros(1, 1, 1, dtype=torch.float64)),
        (Replacement("a", "zeros"), torch.zeros_like(X)),
    ],
    ids=lambda value: getattr(value, "by", ""),
)
def test_a_substitute_returns_what_its_name_says(replacement: Replacement, expected: Tensor):
    found = substitute_of(replacement)(X)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_substitute_takes_the_first_tensor_and_returns_as_many_entries():
    assert First(0)("text", X) is X
    assert First(0)(None, 2, named=X) is X
    found, *rest = Zeros(3)(X)
    assert found.tolist() == [[0, 0], [0, 0]]
    assert rest == [None, None]
    assert len(Zero(2, 1)(X)) == 1
    assert repr(First(2)) == "First(entries=2)"
    assert repr(First(0)) == "First()"


def test_modules_are_replaced_under_every_name_and_keep_mode_and_facts():
    norm = nn.LayerNorm(2, eps=0.25)
    norm.in_use, norm.note, norm.count, norm._own = True, "text", 3, 1.0
    net = nn.Sequential(norm, nn.ReLU(), nn.Sequential(norm)).train()
    norm.eval()
    replace_modules_(net, [Replacement("0", "identity")])
    assert isinstance(net[0], nn.Identity)
    assert net[0] is net[2][0]
    assert not net[0].training
    assert net[1].training
    assert (net[0].eps, net[0].in_use, net[0].note) == (0.25, True, "text")
    assert not hasattr(net[0], "count")  # sizes no longer hold
    assert not hasattr(net[0], "_own")
