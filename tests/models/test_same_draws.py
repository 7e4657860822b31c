"""Random numbers for two networks of which one has fewer channels."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.models.same_draws import SameDraws, largest_over_chances

X = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
KEPT = [0, 2, 3, 7]
OWN_GENERATOR = torch.Generator().manual_seed(5)

Call = Callable[[Tensor], Tensor]


def dropped(x: Tensor) -> Tensor:
    return x * (torch.rand(len(x), x.shape[1], 1, 1) > 0.5)


def latent(x: Tensor) -> Tensor:
    return torch.normal(x, torch.full_like(x, 0.1))


def by_own_generator(x: Tensor) -> Tensor:
    return x + torch.randn(x.shape, generator=OWN_GENERATOR)


def by_python_and_numpy(x: Tensor) -> Tensor:
    return x * random.random() + float(np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.dropout(x, 0.5, True),
        lambda x: F.dropout2d(x, 0.5, True),
        lambda x: F.alpha_dropout(x, 0.5, True),
        lambda x: F.rrelu(x, training=True),
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        lambda x: x + torch.randn_like(x).mean(1, keepdim=True),
        lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
        lambda x: x.new_empty(x.shape).bernoulli_(x.new_full((2, 1, 1, 1), 0.5)),
        lambda x: x[torch.randperm(2)] + torch.randint(0, 9, (2, 1, 1, 1)),
        lambda x: x * torch.distributions.Beta(0.5, 0.5).sample((2, 1, 1, 1)),
        lambda x: x * torch.zeros(x.shape, dtype=torch.bool).bernoulli_(torch.full(x.shape, 0.5)),
        lambda x: torch.normal(x),
        dropped,
        latent,
        by_own_generator,
        by_python_and_numpy,
    ],
)
def test_a_network_with_fewer_channels_draws_what_the_other_drew(call: Call):
    own = OWN_GENERATOR.get_state()
    answers, errors = list[Tensor](), dict[SameDraws, float]()

    def compare(draws: SameDraws) -> float:
        with draws.recording():
            expected = call(X.clone())
        with draws.replaying():
            found = call(X[:, KEPT])
        answers.append(expected)
        errors[draws] = float((expected[:, KEPT] - found).abs().max())
        return 0.0

    largest_over_chances(compare, enough=1.0)
    assert set(errors.values()) == {0.0}
    assert all(answer.isfinite().all() for answer in answers)
    assert torch.equal(OWN_GENERATOR.get_state(), own)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: float(torch.rand(()) < 0.05),
        lambda: float(torch.rand(()) < 0.95),
        lambda: float(torch.zeros(()).bernoulli_(0.01)),
        lambda: float(torch.zeros(()).bernoulli_(0.99)),
        lambda: float(torch.randint(0, 30, ()) == 29),
        lambda: float(torch.randint(0, 3, ()) == 1),
        lambda: float(0.3 < random.random() < 0.4),
        lambda: float(torch.randperm(3)[0] == 0),
        lambda: float(random.random() < 0.1),
        lambda: float(np.random.rand() > 0.9),  # noqa: NPY002
    ],
)
def test_rare_branches_are_taken_once_and_left_once(draw: Callable[[], float]):
    seen = set()

    def compare(draws: SameDraws) -> float:
        with draws.recording():
            seen.add(draw())
        return 0.0

    largest_over_chances(compare, enough=1.0)
    assert seen == {0.0, 1.0}


def test_what_does_not_draw_is_compared_once():
    runs = []

    def compare(draws: SameDraws) -> None:
        with draws.recording():
            runs.append(F.relu(X))

    assert largest_over_chances(compare, enough=1.0) is None
    assert len(runs) == 1


def test_the_largest_error_counts_and_ends_the_comparison():
    errors = iter([0.1, 0.3, 0.2])

    def compare(draws: SameDraws) -> float | None:
        with draws.recording():
            torch.rand(())
        return next(errors)

    assert largest_over_chances(compare, enough=0.2) == 0.3
    assert next(errors) == 0.2


def draw_until_one_is_kept() -> None:
    while not (torch.rand(3) > 0.5).any():
        pass


def test_code_that_draws_until_chance_helps_comes_to_an_end():
    with SameDraws().recording():
        draw_until_one_is_kept()
    with pytest.raises(RuntimeError, match="which are all the same here"), SameDraws(0.02).recording():
        draw_until_one_is_kept()


def test_values_that_a_draw_depends_on_are_not_hidden():
    draws = SameDraws()
    with draws.recording():
        one = torch.normal(X, torch.ones(X.shape))
    with draws.replaying():
        two = torch.normal(X + 1, torch.ones(X.shape))
    torch.testing.assert_close(two, one + 1)


class DropsSamples(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5)


def test_a_network_without_a_block_draws_the_same_in_the_others():
    whole = nn.Sequential(DropsSamples(), nn.Sequential(DropsSamples()))
    shorter = nn.Sequential(nn.Identity(), nn.Sequential(DropsSamples()))
    images, draws = torch.ones(64, 1, 1, 1), SameDraws()
    with draws.recording(whole):
        whole(images)
        expected = whole[1](images)
    with draws.replaying(shorter):
        shorter(images)
        found = shorter[1](images)
    assert torch.equal(found, expected)
    assert 0 < found.sum() < 64
