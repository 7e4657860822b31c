"""What the code does with sizes beside stating them: whatever it compares or looks up, no cut may turn it unseen."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy import Plan, find_groups, verify
from tests.grouping.test_unseen_code import IMAGES

Body = Callable[["TwoLayers", Tensor, Tensor], Tensor]


class TwoLayers(nn.Module):
    """Two layers on the same images, and what a function of the network and their outputs makes of them."""

    def __init__(self, body: Body, widths: tuple[int, int] = (8, 8), width_of_body: int = 16) -> None:
        super().__init__()
        self.body, (a, b) = body, widths
        self.a, self.b, self.a_to_b = nn.Conv2d(3, a, 3), nn.Conv2d(3, b, 3), nn.Conv2d(a, b, 1)
        self.head_of_a, self.head_of_b = nn.Conv2d(a, 4, 1), nn.Conv2d(b, 4, 1)
        self.head = nn.Conv2d(width_of_body, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.a(x).relu(), self.b(x).relu())


def joined(net: TwoLayers, maps: Sequence[Tensor]) -> Tensor:
    return net.head(torch.cat([*maps], 1))


def sorted_by_a_function_of_torch(net: TwoLayers, a: Tensor, b: Tensor) -> Tensor:
    return joined(net, sorted([a, b], key=torch.numel))


def sorted_by_the_negative(net: TwoLayers, a: Tensor, b: Tensor) -> Tensor:
    return joined(net, sorted([a, b], key=lambda each: -each.shape[1]))


def in_a_heap(net: TwoLayers, a: Tensor, b: Tensor) -> Tensor:
    heap = [(a.shape[1], 0), (b.shape[1], 1)]
    heapq.heapify(heap)
    return joined(net, [(a, b)[heapq.heappop(heap)[1]] for _ in range(2)])


def sorted_by_numpy(net: TwoLayers, a: Tensor, b: Tensor) -> Tensor:
    return joined(net, [(a, b)[place] for place in np.argsort([a.shape[1], b.shape[1]], kind="stable")])


def sorted_as_a_tensor(net: TwoLayers, a: Tensor, b: Tensor) -> Tensor:
    return joined(net, [(a, b)[place] for place in torch.tensor([a.shape[1], b.shape[1]]).argsort(stable=True)])


def widest_and_narrowest(net: TwoLayers, a: Tensor, b: Tensor) -> Tensor:
    widest, narrowest = max([a, b], key=lambda each: each.size(1)), min([a, b], key=lambda each: each.size(1))
    return net.head_of_b(widest) - net.head_of_a(narrowest)


def added_where_it_fits(net: TwoLayers, a: Tensor, b: Tensor) -> Tensor:
    with suppress(RuntimeError):
        b = b + a
    return net.head_of_b(b)


def a_layer_where_it_fits(net: TwoLayers, a: Tensor, b: Tensor) -> Tensor:
    try:
        return net.head_of_a(b)
    except RuntimeError:
        return net.head_of_b(b) + net.head_of_a(a)


def compared_as_plain_integers(net: TwoLayers, a: Tensor, b: Tensor) -> Tensor:
    if int(a.shape[1]) != int(b.shape[1]):
        a = net.a_to_b(a)
    return net.head_of_b(b + a)


def with_a(change: Callable[[Tensor], Tensor]) -> Body:
    def body(net: TwoLayers, a: Tensor, b: Tensor) -> Tensor:
        return net.head_of_a(change(a)) + net.head_of_b(b)

    body.__name__ = change.__name__
    return body


def a_power_of_two(a: Tensor) -> Tensor:
    return a * 2 if a.shape[1] & (a.shape[1] - 1) else a + 1


def rounded_up(a: Tensor) -> Tensor:
    return a * 2 if math.ceil(a.shape[1] / 8) > 2 else a + 1


def a_root(a: Tensor) -> Tensor:
    return a * 2 if a.shape[1] ** 0.5 > 4 else a + 1


def counted(a: Tensor) -> Tensor:
    return a * 2 if len(a[0]) > 7 else a + 1


def as_small_as_two(a: Tensor) -> Tensor:
    return a + min(a.shape[1], 2)


def looked_up(a: Tensor) -> Tensor:
    return a * {10: 3.0, 5: 2.0}.get(a.shape[1], 1.0)


def in_a_set(a: Tensor) -> Tensor:
    return a * 2 if a.shape[1] in {5, 10, 15} else a + 1


def viewed_where_it_fits(a: Tensor) -> Tensor:
    try:
        halves = a.view(len(a), 8, -1, *a.shape[2:])
    except RuntimeError:
        return a
    return halves.flip(2).reshape(a.shape)


@pytest.mark.parametrize(
    ("body", "widths", "wrong"),
    [
        (sorted_by_a_function_of_torch, (8, 8), {"a": 7, "b": 3}),
        (sorted_by_the_negative, (8, 8), {"a": 3, "b": 7}),
        (in_a_heap, (8, 8), {"a": 7, "b": 3}),
        (sorted_by_numpy, (8, 8), {"a": 7, "b": 3}),
        (sorted_as_a_tensor, (8, 8), {"a": 7, "b": 3}),
        (widest_and_narrowest, (8, 12), {"a": 8, "b": 4}),
        (added_where_it_fits, (12, 8), {"a": 8, "b": 8}),
        (a_layer_where_it_fits, (12, 8), {"a": 8, "b": 8}),
        (compared_as_plain_integers, (12, 8), {"a": 8, "b": 8}),
        (with_a(a_power_of_two), (20, 6), {"a": 16, "b": 6}),
        (with_a(rounded_up), (20, 6), {"a": 16, "b": 6}),
        (with_a(a_root), (20, 6), {"a": 16, "b": 6}),
        (with_a(counted), (20, 6), {"a": 7, "b": 6}),
        (with_a(as_small_as_two), (20, 6), {"a": 1, "b": 6}),
        (with_a(looked_up), (20, 6), {"a": 10, "b": 6}),
        (with_a(in_a_set), (20, 6), {"a": 10, "b": 6}),
        (with_a(viewed_where_it_fits), (20, 6), {"a": 16, "b": 6}),
    ],
)
def test_no_cut_turns_what_the_code_does_with_sizes(body: Body, widths: tuple[int, int], wrong: dict[str, int]):
    torch.manual_seed(0)
    net = TwoLayers(body, widths).eval()
    groups = find_groups(net, IMAGES)
    prunable = {group.name for group in groups if group.is_prunable}
    dense = dict(zip("ab", widths, strict=True))
    assert not {name for name, width in wrong.items() if width < dense[name]} <= prunable
    for kept in (wrong, {"a": 1, "b": 1}, {"a": widths[0] // 2, "b": 1}, {"a": 1, "b": widths[1] // 2}):
        plan = Plan({name: tuple(range(count)) for name, count in kept.items() if name in prunable})
        verify(net, groups, plan, IMAGES, tolerance=1e-4)


def scaled_attention(net: TwoLayers, a: Tensor, b: Tensor) -> Tensor:
    scores = a.flatten(2).transpose(1, 2) @ a.flatten(2) / int(a.shape[1]) ** 0.5
    return net.head_of_b((b.flatten(2) @ scores.softmax(-1)).unflatten(2, b.shape[2:]))


def test_a_factor_of_a_width_keeps_the_layers_of_its_line_and_no_others():
    torch.manual_seed(0)
    groups = find_groups(TwoLayers(scaled_attention).eval(), IMAGES)
    found = {group.name: group.is_prunable for group in groups}
    assert not found["a"]
    assert found["b"]


class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Conv2d(3, 48, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        q, k, v = (each.reshape(batch, 4, -1, height * width) for each in self.qkv(x).chunk(3, 1))
        q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-1)
        context = torch.einsum("bhdn,bhen->bhde", k, v)
        return self.head(torch.einsum("bhde,bhdn->bhen", context, q).reshape(batch, -1, height, width))


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_heads_of_linear_attention_are_cut_to_any_width(kept: int):
    torch.manual_seed(0)
    net = LinearAttention().eval()
    groups = find_groups(net, IMAGES)
    (heads,) = [group for group in groups if group.name == "qkv"]
    assert heads.is_prunable
    verify(net, groups, Plan({"qkv": tuple(range(kept))}), IMAGES, tolerance=1e-4)
