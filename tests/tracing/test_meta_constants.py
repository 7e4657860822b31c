"""Tests of values on the meta device: known for constants, and for nothing that an input or a weight has a part in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import passdeploy as pd
from passdeploy.tracing import meta_constants
from passdeploy.tracing.meta_model import MetaMode
from passdeploy.tracing.trace_channels import trace_channels


def on_meta(compute: Callable[[Tensor], object]) -> object:
    """Run a function of an unknown tensor of shape (2, 3) on the meta device."""
    unknown = torch.empty(2, 3, device="meta")
    with MetaMode():
        return compute(unknown)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, device="meta")


def overwritten(x: Tensor) -> Tensor:
    mask = ones(2, 3)
    mask[0].copy_(x[0])
    return mask


def drawn(x: Tensor) -> Tensor:
    return torch.rand(3, device="meta")


def partly_zero(x: Tensor) -> bool:
    mask = ones(2, 3)
    row = mask[0]
    mask[0, 1] = 0.0  # a view of memory that `row` shares
    return bool(row.all())


KNOWN: dict[str, tuple[Callable[[Tensor], object], object]] = {
    "a mask of ones": (lambda x: bool(ones(2, 3).all()), True),
    "the shape of an input": (lambda x: x.new_ones(x.shape[1]).sum().item(), 3.0),
    "ones like an input": (lambda x: torch.ones_like(x).sum().item(), 6.0),
    "a row that was written to through another view": (partly_zero, False),
    "written in place": (lambda x: ones(2).add_(1).mul_(ones(2) * 3).tolist(), [6.0, 6.0]),
    "two results": (lambda x: torch.arange(4.0, device="meta").max(0)[1].item(), 3),
    "compared": (lambda x: torch.equal(ones(2), ones(2) * 1), True),
    "of other type": (lambda x: torch.arange(3, device="meta").to(torch.float32)[2].item(), 2.0),
}
UNKNOWN: dict[str, Callable[[Tensor], object]] = {
    "an input": lambda x: x.sum().item(),
    "a mask that an input was added to": lambda x: (ones(2, 3) + x).sum().item(),
    "a mask that was overwritten by an input": lambda x: overwritten(x).sum().item(),
    "a view of that mask": lambda x: overwritten(x)[1, 1].item(),
    "a constant added to an input in place": lambda x: x.add_(ones(2, 3)).sum().item(),
    "random numbers": lambda x: drawn(x).sum().item(),
    "memory that nothing was written to": lambda x: torch.empty(3, device="meta").sum().item(),
    "more than a mask has": lambda x: ones(meta_constants.MAX_ELEMENTS + 1).sum().item(),
}


@pytest.mark.parametrize("case", KNOWN)
def test_values_of_constants_are_known(case: str):
    compute, value = KNOWN[case]
    assert on_meta(compute) == value


@pytest.mark.parametrize("case", UNKNOWN)
def test_other_values_are_not(case: str):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        on_meta(UNKNOWN[case])


class Masked(nn.Module):
    """Tokens with a mask of ones, which the code looks at, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(6, 16), nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = torch.ones(tokens.shape[:2], device=tokens.device)
        x = self.mix(torch.relu(self.embed(tokens)))
        if not mask.to(torch.bool).all():
            x = x[..., :8]
        return self.head(x.mean(1))


def test_a_network_that_looks_at_its_mask_is_traced_without_values():
    net, tokens = Masked().eval(), torch.randn(2, 5, 6)
    assert trace_channels(net, tokens).is_meta
    groups = pd.find_groups(net, tokens)
    assert {group.name: group.width for group in groups if group.is_prunable} == {"embed": 16, "mix": 24}
    plan = pd.Plan({"embed": tuple(range(5)), "mix": tuple(range(3, 20))})
    assert pd.verify(net, groups, plan, tokens, tolerance=1e-5) <= 1e-5


def test_nothing_is_kept_of_a_network_that_is_gone():
    before = len(meta_constants._values)
    on_meta(lambda x: ones(2, 3).sum().item())
    assert len(meta_constants._values) == before
