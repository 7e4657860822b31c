"""Tests of the graphs that Torch-TensorRT gets, on the CPU and without it: replaced operators, in-place ones, lines."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from passdeploy.errors import ExportError
from passdeploy.export.artifact import BatchRange
from passdeploy.export.torch_trt_lowering import (
    LoweredGraph,
    export_graph,
    functional_graph,
    is_operator,
    operator_name,
    require_same,
    source_line,
)

OPEN = BatchRange(1, 3, 8)


def lowered(network: nn.Module, size: int = 16, sizes: BatchRange = OPEN) -> GraphModule:
    return functional_graph(export_graph(network.eval(), (3, size, size), sizes))


def operators(graph: torch.fx.Graph) -> set[str]:
    return {operator_name(node) for node in graph.nodes if is_operator(node)}


class Pool(nn.Module):
    def __init__(self, function: str, **options: object) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, images: Tensor) -> Tensor:
        pooled: Tensor = getattr(F, self.function)(images, **self.options)
        return pooled


POOLS = [
    {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": True}
    for kernel, stride, padding in product((2, 3), (1, 2, 3), (0, 1))
]


@pytest.mark.parametrize("size", [9, 10, 11])
def test_pools_with_ceil_mode_become_pools_without(size: int):
    images = torch.randn(2, 3, size, size)
    pools = [Pool("max_pool2d", **options) for options in POOLS]
    pools += [Pool("avg_pool2d", **options, count_include_pad=counts) for options in POOLS for counts in (True, False)]
    for pool in pools:
        graph = torch.fx.symbolic_trace(Through(pool.function, pool.options))
        torch.testing.assert_close(
            LoweredGraph(graph)(images), pool(images), msg=lambda text, pool=pool: f"{vars(pool)}"
        )
    program = export_graph(LoweredGraph(lowered(Pool("max_pool2d", **POOLS[-1]), size)), (3, size, size), OPEN)
    (pool,) = (node for node in program.graph.nodes if operator_name(node) == "max_pool2d")
    assert pool.args[5:] in ((), (False,))


class Through(nn.Module):
    """A call of the operator that torch.export makes of a pool, traced without exporting it."""

    def __init__(self, function: str, options: dict[str, object]) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, images: Tensor) -> Tensor:
        pair = {name: [self.options[name]] * 2 for name in ("kernel_size", "stride", "padding")}
        operator = getattr(torch.ops.aten, self.function).default
        if self.function == "max_pool2d":
            return operator(images, *pair.values(), [1, 1], True)
        return operator(images, *pair.values(), True, self.options["count_include_pad"])


class ChannelsLast(nn.Module):
    """The end of ConvNeXt, whose average decomposes into `as_strided` with an open batch."""

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 1).flatten(1)


def test_an_average_of_whole_images_becomes_a_mean():
    network, images = ChannelsLast(), torch.randn(3, 3, 16, 16)
    before = export_graph(network, (3, 16, 16), OPEN).run_decompositions()
    assert "as_strided" in operators(before.graph)
    program = export_graph(LoweredGraph(lowered(network)), (3, 16, 16), OPEN)
    assert "as_strided" not in operators(program.run_decompositions().graph)
    torch.testing.assert_close(program.module()(images), network(images))


class Statistics(nn.Module):
    """Norms and activations whose decompositions have operators that TensorRT does not have, or compute in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))

    def forward(self, images: Tensor) -> Tensor:
        variance, mean = torch.var_mean(images, (2, 3), keepdim=True, correction=0)
        x = (images - mean) / (variance + 1e-3).sqrt()
        x = x * images.var(1, keepdim=True) + images.var(dim=(1, 2), keepdim=True, unbiased=False)
        x = F.rms_norm(x, (16,), self.weight, 1e-6) + F.rms_norm(x, (16,))
        x = F.hardswish(x) + F.hardsigmoid(x) + F.relu6(x) + F.hardtanh(x, -0.5, 0.7)
        return torch.cat([x.std((2, 3)), x.std(dim=(2, 3), correction=0), x.var(2).flatten(1)], 1)


@torch.no_grad()
def test_statistics_and_activations_become_simple_operators():
    network, images = Statistics(), torch.randn(3, 3, 16, 16)
    graph = lowered(network)
    torch.testing.assert_close(LoweredGraph(graph)(images), network(images), rtol=1e-5, atol=1e-5)
    left = operators(export_graph(LoweredGraph(graph), (3, 16, 16), OPEN).graph)
    assert left <= {"add", "sub", "mul", "div", "clamp", "mean", "sum", "sqrt", "rsqrt", "squeeze", "cat", "flatten"}


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), [(3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 1, 2)])
def test_folding_becomes_a_transposed_convolution(kernel: int, stride: int, padding: int, dilation: int):
    options = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}

    class Fold(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return F.fold(F.unfold(images, **options), (16, 16), **options)

    images = torch.randn(3, 3, 16, 16)
    graph = lowered(Fold())
    torch.testing.assert_close(LoweredGraph(graph)(images), Fold()(images))
    program = export_graph(LoweredGraph(graph), (3, 16, 16), OPEN)
    assert "_unsafe_index_put" not in operators(program.run_decompositions().graph)


class InPlace(nn.Module):
    """Operators in place: on a new value, on one that is read again, and on a view of one."""

    def __init__(self, of_a_view: bool) -> None:
        super().__init__()
        self.convolution, self.of_a_view = nn.Conv2d(3, 4, 1), of_a_view

    def forward(self, images: Tensor) -> Tensor:
        x = self.convolution(images)
        x.relu_()
        if self.of_a_view:
            x[:, :2].add_(1)
        x += x.mean((2, 3), keepdim=True)
        return F.dropout(x, 0.5, self.training, inplace=True)


@pytest.mark.parametrize("of_a_view", [False, True])
def test_operators_in_place_are_replaced(of_a_view: bool):
    network, images = InPlace(of_a_view), torch.randn(3, 3, 16, 16)
    graph = lowered(network)
    assert not [name for name in operators(graph.graph) if name.endswith("_") or "dropout" in name]
    before = images.clone()
    torch.testing.assert_close(LoweredGraph(graph)(images), network(images))
    assert torch.equal(images, before)


class WithoutAutocast(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            x = images.float() * 2
        with torch.no_grad():
            return (x + 1).mean((2, 3))


def test_regions_without_autocast_and_gradients_are_inlined():
    network, images = WithoutAutocast(), torch.randn(3, 3, 16, 16)
    graph = lowered(network)
    assert not [name for name in operators(graph.graph) if name.startswith("wrap_with")]
    torch.testing.assert_close(LoweredGraph(graph)(images), network(images))


def test_nodes_keep_their_source_lines():
    program = export_graph(LoweredGraph(lowered(InPlace(False))), (3, 16, 16), OPEN)
    lines = {operator_name(node): source_line(node) for node in program.graph.nodes if is_operator(node)}
    first = InPlace.forward.__code__.co_firstlineno
    assert lines["relu"] == f"test_torch_trt_lowering.py:{first + 2}"
    assert lines["mean"] == f"test_torch_trt_lowering.py:{first + 5}"


def test_a_graph_that_differs_is_refused():
    network = InPlace(False).eval()
    graph = lowered(copy.deepcopy(network))
    images = torch.randn(3, 3, 16, 16)
    assert require_same(LoweredGraph(graph), network, images) <= 1e-6
    with torch.no_grad():
        network.convolution.weight.mul_(1.01)
    with pytest.raises(ExportError, match=r"differs from the network by \d\.\de-0[23] on the CPU \(limit 1e-05\)"):
        require_same(LoweredGraph(graph), network, images)
