"""Tests of an operation's variants: in place, `out=` and copies of views have the rule of the operation itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy import Plan, find_groups, verify
from passdeploy.tracing.op_call import functional_packet
from passdeploy.tracing.rules import find_rule
from tests.nets import Head

aten = torch.ops.aten
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def overloads() -> Iterator[torch._ops.OpOverload]:
    for name in dir(aten):
        packet = getattr(aten, name)
        if isinstance(packet, torch._ops.OpOverloadPacket):
            yield from (getattr(packet, overload) for overload in packet.overloads())


def test_all_variants_of_an_operation_have_its_rule():
    variants = [op for op in overloads() if functional_packet(op) is not op.overloadpacket]
    assert len(variants) > 200
    different = {
        str(op)
        for op in variants
        if find_rule(op) is not find_rule(getattr(functional_packet(op), functional_packet(op).overloads()[0]))
    }
    assert different == {"aten.as_strided_.default"}  # torch changes strides with it, where the shape stays


ACTIVATIONS = (
    "relu",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "leaky_relu",
    "elu",
    "celu",
    "selu",
    "gelu",
    "mish",
    "silu",
)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_elementwise_in_every_torch(name: str):
    rule = find_rule(aten.relu.default)
    assert rule is not None
    assert find_rule(getattr(aten, name).default) is rule
    assert find_rule(getattr(aten, f"{name}_").default) is rule


class Between(nn.Module):
    """A network with one function between two convolutions."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), Head(6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.function(self.first(x))))


def prunable_groups(model: nn.Module, images: Tensor = IMAGES) -> set[str]:
    """Halve every prunable group, verify the slim network, and return the names of these groups."""
    groups = find_groups(model.eval(), images)
    halves = {group.name: tuple(range(0, group.width, 2)) for group in groups if group.is_prunable}
    if halves:
        verify(model, groups, Plan(halves), images, tolerance=1e-5)
    return set(halves)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "relu6_": lambda x: F.relu6(x, inplace=True),
    "leaky_relu_": lambda x: F.leaky_relu(x, inplace=True),
    "abs_": lambda x: (x * 2).abs_(),
    "abs.out": lambda x: torch.abs(x, out=torch.empty_like(x)),
    "cat.out": lambda x: torch.cat([x], 1, out=torch.empty_like(x)),
    "permute_copy": lambda x: torch.permute_copy(torch.permute_copy(x, (1, 0, 2, 3)), (1, 0, 2, 3)),
    "unbind_copy": lambda x: torch.stack(torch.unbind_copy(x, 0)),
    "transpose_": lambda x: (x + 0).transpose_(1, 2).transpose_(1, 2),
    "squeeze_": lambda x: (x + 0).unsqueeze_(1).squeeze_(1),
    "floor_divide": lambda x: torch.floor_divide(x * 4, 3),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_channels_are_followed_through_variants(function: Callable[[Tensor], Tensor]):
    assert {"first", "second"} == prunable_groups(Between(function))


def test_a_tensor_squeezed_in_place_keeps_its_channels_apart_from_its_pixels():
    class Squeezed(nn.Module):
        """One image of 8 channels and 8 rows: after squeezing, rows stand where channels were."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.rows, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).squeeze_(0)  # (channels, rows, columns)
            x = self.rows(x.transpose(1, 2)).mean(1)  # (channels, rows)
            return self.fc(x.t_()).mean(0, keepdim=True)

    assert prunable_groups(Squeezed(), IMAGES[:1]) == {"first", "rows"}


def test_a_buffer_that_results_are_written_into_is_cut_with_them():
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), Head(6)
            self.register_buffer("space", torch.zeros(2, 8, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(torch.cat([self.first(x)], 1, out=self.space)))

    assert prunable_groups(Buffered()) == {"first", "second"}


def test_a_product_written_into_a_tensor_does_not_take_it_for_a_factor():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8, 8))
            self.fc = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).mean((2, 3))
            return self.fc(torch.mm(x, self.weight, out=torch.empty_like(x)))

    assert prunable_groups(Product()) == {"first"}  # which the tensor has as well
