"""Tests of the cast to fp16 and bf16 for Torch-TensorRT, on the CPU and without it; the rule is that of ONNX graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passdeploy.errors import ParityError
from passdeploy.export import export_onnx
from passdeploy.export.artifact import BatchRange
from passdeploy.export.casting import cast_graph, emulate_rounding
from passdeploy.export.ort_session import open_session
from passdeploy.export.precision import LIMITS
from passdeploy.export.reference import compute_reference
from passdeploy.export.torch_trt_casting import CastGraph, castable_layers, prepare_for_casting
from passdeploy.export.torch_trt_lowering import LoweredGraph, export_graph, functional_graph, operator_name
from passdeploy.export.torch_trt_network import export_network

from .nets import small_net

OPEN = BatchRange(1, 3, 8)


def prepared(network: nn.Module) -> GraphModule:
    return prepare_for_casting(functional_graph(export_graph(network.eval(), (3, 16, 16), OPEN)))


def names(graph: GraphModule) -> list[str]:
    return [operator_name(node) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_batch_norms_are_folded_in_float32(images: Tensor):
    network = small_net()
    network.block[1].running_var.fill_(1e-8)  # zero in fp16
    graph = prepared(network)
    assert "batch_norm" not in names(graph)
    assert names(graph).count("conv2d") == 4
    torch.testing.assert_close(LoweredGraph(graph)(images), network(images), rtol=1e-4, atol=1e-4)


class NormFirst(nn.Module):
    """Batch norms that cannot be folded: before a convolution, and after one that something else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.convolution, self.second = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.convolution(self.norm(images))
        return (self.second(x) + x).mean((2, 3))


@torch.no_grad()
def test_other_batch_norms_become_scale_and_shift(images: Tensor):
    network = NormFirst()
    network(images * 3 + 1)  # sets the statistics
    graph = prepared(network)
    assert names(graph).count("mul") == 2
    torch.testing.assert_close(LoweredGraph(graph)(images), network.eval()(images), rtol=1e-5, atol=1e-5)


class Standardised(nn.Module):
    """A convolution whose weight is computed from another, as in networks without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3) * 1e-3)

    def forward(self, images: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.var((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(images, weight * 1e-3).mean((2, 3))


@torch.no_grad()
def test_constants_are_computed_in_float32(images: Tensor):
    network = Standardised()  # its variances are below what fp16 can hold
    graph = prepared(network)
    assert names(graph) == ["conv2d", "mean"]
    cast = CastGraph(graph, "fp16")
    torch.testing.assert_close(cast(images), network(images), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@torch.no_grad()
def test_everything_is_cast_but_inputs_and_outputs(precision: str, dtype: torch.dtype, images: Tensor):
    network = small_net()
    program = export_graph(CastGraph(prepared(network), precision), (3, 16, 16), OPEN)
    assert {weight.dtype for weight in program.state_dict.values()} == {dtype}
    computed = {
        node.meta["val"].dtype
        for node in program.graph.nodes
        if operator_name(node) in ("conv2d", "linear", "add", "mean")
    }
    assert computed == {dtype}
    outputs = program.module()(images)
    assert (images.dtype, outputs.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(outputs, network(images), rtol=0.05, atol=0.05)


@torch.no_grad()
def test_the_emulation_rounds_as_that_of_the_onnx_graph_does(images: Tensor, tmp_path: Path):
    network = small_net()
    exported = export_onnx(network, images, tmp_path / "model.onnx")
    onnx_cast = emulate_rounding(cast_graph(onnx.load(exported.path), "fp16"))
    (expected,) = open_session(onnx_cast, threads=1, is_optimised=False).run(None, {"images": images.numpy()})
    emulated = CastGraph(prepared(network), "fp16", is_emulated=True)(images)
    exact = network(images)
    error = float((emulated - torch.from_numpy(expected)).abs().max())
    rounding = float((emulated - exact).abs().max())
    assert 0 < rounding < 0.02
    assert error < rounding  # they differ only where sums are added in another order


@torch.no_grad()
def test_kept_layers_and_numbers_beyond_the_range_stay_float32(images: Tensor):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten()).eval()
    network[1].bias[0] = 1e5
    graph = prepared(network)
    cast = CastGraph(graph, "fp16", keep=("conv2d_2",))
    assert cast.kept == {"conv2d_1", "conv2d_2"}
    program = export_graph(cast, (3, 16, 16), OPEN)
    types = [node.meta["val"].dtype for node in program.graph.nodes if operator_name(node) == "conv2d"]
    assert types == [torch.float16, torch.float32, torch.float32]
    assert CastGraph(graph, "bf16").kept == frozenset()
    torch.testing.assert_close(cast(images), network(images), rtol=1e-2, atol=1e-2)


class Normalizing(nn.Module):
    """Divides by lengths, mean squares and sums, which numbers below those of fp16 keep from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.tensor(1e-10))

    def forward(self, images: Tensor) -> Tensor:
        x = torch.nn.functional.normalize(images, dim=1)
        y = images / (images.square().mean(1, keepdim=True) + 1e-9)
        return (x + y + images / (images.abs().sum(1, keepdim=True) + self.eps)).flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("is_emulated", [False, True])
def test_numbers_that_guard_a_division_are_not_rounded_to_zero(is_emulated: bool, images: Tensor):
    network, dark = Normalizing().eval(), images.clone()
    dark[:, :, :4] = 0.0
    outputs = CastGraph(prepared(network), "fp16", is_emulated=is_emulated)(dark)
    torch.testing.assert_close(outputs, network(dark), rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_an_overflow_shows_in_the_emulation(images: Tensor):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten()).eval()
    network[0].weight.mul_(1e5)
    network[1].weight.mul_(1e-5)
    graph = prepared(network)
    assert castable_layers(graph) == ("conv2d", "conv2d_1")
    assert not CastGraph(graph, "fp16", is_emulated=True)(images).isfinite().all()
    assert CastGraph(graph, "fp16", keep=castable_layers(graph), is_emulated=True)(images).isfinite().all()


@torch.no_grad()
def test_layers_are_kept_until_the_limits_hold_or_the_precision_is_refused(images: Tensor):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten()).eval()
    network[0].weight.mul_(1e5)
    network[1].weight.mul_(1e-5)
    reference = compute_reference(network, images, batch_sizes=(1, 2))
    program = export_network(network, (3, 16, 16), OPEN, "fp16", reference, LIMITS["fp16"])
    assert program.kept_modules == ("0", "1")  # the first overflows, and the second reads that
    torch.testing.assert_close(program.program.module()(images), network(images), rtol=0.02, atol=0.02)
    network[2].weight.mul_(1e9)
    reference = compute_reference(network, images, batch_sizes=(1, 2))
    with pytest.raises(ParityError, match="the fp16 graph for Torch-TensorRT differs from the PyTorch model"):
        export_network(network, (3, 16, 16), OPEN, "fp16", reference, replace(LIMITS["fp16"], rel_error=1e-9))
