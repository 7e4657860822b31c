"""Tests of meta-device copies: shapes are those of torch, and networks that need values are traced with values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model

from passdeploy import Plan, find_groups, verify
from passdeploy.tracing import meta_model
from passdeploy.tracing.meta_model import MetaModel, run_on_meta
from passdeploy.tracing.trace_channels import trace_channels

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
aten = torch.ops.aten


def on_meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


X, ROW, COLUMN, ONE = on_meta(2, 6, 4, 4), on_meta(6), on_meta(6, 1, 1), on_meta(1)
BETWEEN = [(X, X), (X, COLUMN), (X, ONE), (X, 2.5), (COLUMN, X), (X, X.transpose(2, 3)), (on_meta(4, 4), X)]
OVER = [(X, [2, 3]), (X, [-1], True)]
ARGUMENTS: dict[Any, list[tuple[Any, ...]]] = {
    aten.native_batch_norm.default: [
        (X, ROW, ROW, ROW, ROW, False, 0.1, 1e-5),
        (X, None, ROW, ROW, ROW, True, 0.1, 1e-5),
    ],
    aten.native_layer_norm.default: [
        (on_meta(2, 5, 6), [6], ROW, ROW, 1e-5),
        (on_meta(2, 5, 6), [5, 6], None, None, 1e-5),
    ],
    aten.native_group_norm.default: [(X, ROW, ROW, 2, 6, 16, 3, 1e-5), (X, None, None, 2, 6, 16, 2, 1e-5)],
    aten.addmm.default: [(ROW, on_meta(3, 4), on_meta(4, 6))],
    aten.cat.default: [([X, X],), ([X, on_meta(2, 1, 4, 4)], 1), ([X, on_meta(2, 6, 4, 3)], -1)],
    aten.roll.default: [(X, [1, -2], [2, 3]), (X, [3])],
    aten.cumsum.default: [(X, 1)],
    aten.grid_sampler_2d.default: [(X, on_meta(2, 3, 5, 2), 0, 0, False)],
    aten.upsample_nearest2d.default: [(X, [8, 6]), (X.transpose(2, 3), [8, 6])],
    aten.upsample_bilinear2d.default: [(X, [8, 6], False)],
    aten.upsample_bicubic2d.default: [(X, [8, 6], True)],
    aten.linalg_vector_norm.default: [(X,), (X, 2, [1]), (X, 2, [-1, 2], True)],
    aten.div.Tensor_mode: [(X, X), (X, 2.5)],
    aten.pow.Tensor_Scalar: [(X, 2), (X, 0.5)],
    aten.clamp.default: [(X, 0.5), (X, None, 2)],
    aten._softmax.default: [(X, -1, False)],
    aten.clamp_min.default: [(X, 1e-6)],
    aten.clamp_max.default: [(X, 1e-6)],
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default), OVER),
    F.scaled_dot_product_attention: [(on_meta(2, 3, 5, 4), on_meta(2, 3, 7, 4), on_meta(2, 3, 7, 9))],
    **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor), BETWEEN),
}


@pytest.mark.parametrize(
    "func",
    sorted({*meta_model._SHAPE_FUNCTIONS, *meta_model._POINTWISE, *meta_model._POINTWISE_IN_PLACE}, key=str),
    ids=str,
)
def test_shapes_are_those_of_torch(func: Any):
    for arguments in ARGUMENTS.get(func, [(X,), (X.transpose(1, 2),)]):
        named = {"rounding_mode": "floor"} if func is aten.div.Tensor_mode else {}
        result, expected = run_on_meta(func, arguments, named), func(*arguments, **named)
        for ours, theirs in zip(*((r,) if isinstance(r, Tensor) else r for r in (result, expected)), strict=True):
            assert (ours.shape, ours.dtype, ours.is_meta) == (theirs.shape, theirs.dtype, True)
            assert ours.stride() == theirs.stride()


@pytest.mark.parametrize(
    ("func", "arguments"),
    [
        (aten.native_batch_norm.default, (X, on_meta(5), None, ROW, ROW, False, 0.1, 1e-5)),
        (aten.native_layer_norm.default, (on_meta(2, 5, 6), [5], None, None, 1e-5)),
        (aten.native_group_norm.default, (X, on_meta(5), ROW, 2, 6, 16, 3, 1e-5)),
        (aten.cat.default, ([X, on_meta(2, 6, 5, 4)], 1)),
        (aten.addmm.default, (ROW, on_meta(3, 4), on_meta(5, 6))),
        (aten.add.Tensor, (X, on_meta(5, 1, 1))),
        (F.scaled_dot_product_attention, (on_meta(2, 3, 5, 4), on_meta(2, 3, 7, 5), on_meta(2, 3, 7, 9))),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_an_error(func: Callable[..., Any], arguments: tuple[Any, ...]):
    with pytest.raises((RuntimeError, ValueError)):
        run_on_meta(func, arguments, {})


def test_a_meta_copy_leaves_the_network_alone():
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head, self.seen = nn.Conv2d(3, 4, 1), nn.Linear(4, 2), list[Tensor]()

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.conv(x).mean((2, 3))
            self.seen.append(self.last)
            return self.head(self.last)

    net = Caching().train()
    find_groups(net, IMAGES)
    assert net.training
    assert not net.seen
    assert not hasattr(net, "last")
    assert all(not parameter.is_meta for parameter in net.parameters())


class Deciding(nn.Module):
    """A network that takes a branch by the value of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run one branch if the input's sum is positive, and the other if not."""
        return self.head(self.one(x) if x.sum() > 0 else self.other(x))


def test_a_network_that_branches_on_values_is_traced_with_values():
    trace = trace_channels(Deciding(), IMAGES.abs())
    assert not trace.is_meta
    assert {one.modules[-1] for one in trace.op_log if one.modules and one.op == "aten.convolution"} == {
        "one",
        "head",
    }
    assert trace_channels(get_model("resnet18", weights=None), torch.randn(1, 3, 32, 32)).is_meta


def test_integer_buffers_keep_their_values():
    class Picking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
            self.register_buffer("order", torch.tensor([5, 3, 1, 0, 2, 4]))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x)[:, self.order])

    net = Picking()
    assert torch.equal(MetaModel.of(net, (IMAGES,)).model.order, net.order)
    groups = find_groups(net, IMAGES)
    assert groups[0].is_prunable or "meets a tensor" in groups[0].reason or "picked" in groups[0].reason
    verify(net, groups, Plan({g.name: (0, 2) for g in groups if g.is_prunable}), IMAGES, tolerance=1e-5)
