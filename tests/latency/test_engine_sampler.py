"""Latency tables of TensorRT engines and of ONNX Runtime on a GPU, with stand-ins for what needs a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto
from torch import nn

from passdeploy.channels.blocks import presence
from passdeploy.channels.costs import Factor
from passdeploy.channels.groups import ChannelMap
from passdeploy.errors import MissingError, UsageError
from passdeploy.grouping.find import map_channels
from passdeploy.latency import cache_folder, resized_networks, whole_call_sampler
from passdeploy.latency.engine_layers import EngineLayer, engine_layers, spread_over_layers
from passdeploy.latency.engine_sampler import EngineSampler
from passdeploy.latency.measurement_context import MeasurementContext
from passdeploy.latency.resized_networks import OnnxNetworks, SlimNetworks, make_sampler
from passdeploy.latency.sampling import SamplingPlan, sample_latency
from passdeploy.latency.search import LATENCY_TOLERANCE, LatencyGoal, LatencySearch
from passdeploy.latency.torch_sampler import TorchSampler
from passdeploy.latency.whole_call_sampler import WholeCallSampler, ort_loader
from passdeploy.profiling import Setting
from passdeploy.profiling.onnx_layers import OnnxLayer
from passdeploy.sparsity.baselines import magnitude_scores
from tests import nets
from tests.profiling.fakes import FakeClock, FakeRunner
from tests.sparsity.test_blocks import Stack

pytest.importorskip("onnxruntime", reason="extra cpu is not installed")

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
QUICK = SamplingPlan(networks=14, repeats=1, seconds=0.01)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, width in ((3, 32), (32, 64), (64, 48), (48, 96)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10)).eval()


@pytest.fixture(scope="module")
def channels(net: nn.Module) -> ChannelMap:
    return map_channels(net, IMAGES[:1])


class FakeEngines:
    """Engines that are their graphs; a convolution takes a microsecond per thousand weights, rounded up to blocks."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.built = clock, list[ModelProto]()

    def build(self, graph: ModelProto, path: Path) -> None:
        self.built.append(graph)
        path.write_bytes(graph.SerializeToString())
        path.with_name(path.name + ".json").write_text("{}")

    def load(self, path: Path, name: str) -> FakeRunner:
        runner = FakeRunner(name, self.clock, 0.01 + sum(self._times(path).values()))
        runner.path = path  # type: ignore[attr-defined]
        return runner

    def layer_times(self, runner: FakeRunner) -> Mapping[str, float]:
        return self._times(runner.path)  # type: ignore[attr-defined]

    def _times(self, path: Path) -> dict[str, float]:
        """Name the layers as TensorRT does: a convolution with its activation, and the rest alone."""
        graph = onnx.load(path).graph
        shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        times = {}
        for node in graph.node:
            if node.op_type in ("Conv", "Gemm"):
                outputs, inputs = (-(-size // 8) * 8 for size in shapes[node.input[1]][:2])
                times[f"{node.name} + something"] = 0.002 + 1e-5 * outputs * inputs
        return {**times, "Reformatting CopyNode for Output Tensor 0": 0.001}


def sampler_of(net: nn.Module, channels: ChannelMap, precision: str = "fp32") -> tuple[EngineSampler, FakeEngines]:
    graphs = OnnxNetworks(net, channels, IMAGES, precision=precision)
    engines = FakeEngines(FakeClock())
    layers = engine_layers(graphs.source, graphs.layers)
    made = EngineSampler(
        graphs.at,
        IMAGES,
        engines,
        layers=layers,
        names=graphs.layers,
        block=8,
        clock=engines.clock,
        blocks=channels.blocks,
    )
    return made, engines


def test_a_table_of_engines_predicts_engines_and_a_target_is_met(net: nn.Module, channels: ChannelMap):
    sampler, engines = sampler_of(net, channels)
    context = MeasurementContext.here(backend="tensorrt", threads=1, batch=2, image_shape=(3, 16, 16))
    table = sample_latency(sampler, channels, context, QUICK)
    assert table.error[0] < 0.03
    assert {name for node in table.nodes for size in node.sizes for name, _ in size.spans} == {
        group.name for group in channels.prunable
    }
    search = LatencySearch(sampler, channels, table, round_to=8, seconds=0.1, clock=engines.clock)
    result = search.find(magnitude_scores(net, channels.groups, norm="l2"), LatencyGoal(share=0.5))
    assert abs(result.best.excess) <= LATENCY_TOLERANCE


def test_layers_keep_their_names_without_a_block_and_its_own_go_with_it():
    torch.manual_seed(0)
    net = nets.randomise_(Stack()).eval()
    channels = map_channels(net, IMAGES[:1], with_blocks=True)
    sampler, _ = sampler_of(net, channels)
    whole = [node.name for node in sampler.measure({}, seconds=0.01).nodes]
    without = sampler.measure({presence("inner.1"): 0, "stem.0": 8}, seconds=0.01)
    assert [node.name for node in without.nodes] == [name for name in whole if not name.startswith("inner.1.")]
    assert len(whole) == len(without.nodes) + 2
    assert sum(node.ms for node in without.nodes) == pytest.approx(without.total_ms - 0.01)
    context = MeasurementContext.here(backend="tensorrt", threads=1, batch=2, image_shape=(3, 16, 16))
    table = sample_latency(sampler, channels, context, QUICK)
    for widths in ({presence("inner.2"): 0}, {presence("inner.0"): 0, presence("inner.1"): 0, "inner.3.0.0": 3}):
        took = sampler.measure(widths, seconds=0.01).total_ms
        assert table.predict_ms(widths) == pytest.approx(took, rel=0.08)


def test_kernels_of_a_network_without_a_block_have_the_names_of_the_whole_one():
    """ONNX Runtime names a fused kernel after a result; numbers that count up would tell the wrong layer."""
    torch.manual_seed(0)
    net = nets.randomise_(Stack()).eval()
    channels = map_channels(net, IMAGES[:1], with_blocks=True)
    graphs = OnnxNetworks(net, channels, IMAGES)
    whole = {node.name: list(node.output) for node in graphs.at({}).graph.node}
    without = {node.name: list(node.output) for node in graphs.at({presence("inner.0"): 0}).graph.node}
    assert without.items() <= whole.items()
    assert {name.partition("/")[0] for name in whole.keys() - without.keys()} == {
        *("", "inner.0.0.1", "inner.0.0.2", "inner.0.2")
    }


def test_an_engine_is_built_once_for_all_sessions_and_old_ones_are_deleted(net: nn.Module, channels: ChannelMap):
    sampler, engines = sampler_of(net, channels)
    first = channels.prunable[0].name
    for _ in range(3):
        sampler.runner({}, "dense")
    assert len(engines.built) == 1
    paths = [sampler.runner({first: width}, "slim").path for width in (8, 16, 24)]  # type: ignore[attr-defined]
    sampler.runner({}, "dense")
    assert len(engines.built) == 5  # the dense one was deleted to make room
    assert [path.is_file() for path in paths] == [False, True, True]
    folder = paths[0].parent
    assert len(list(folder.iterdir())) == 6  # engines and sidecars
    del sampler
    assert not folder.exists()


@pytest.mark.parametrize(("precision", "kind"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_engines_are_built_from_graphs_in_the_precision_of_the_export(
    precision: str, kind: int, net: nn.Module, channels: ChannelMap
):
    sampler, engines = sampler_of(net, channels, precision)
    sampler.runner({channels.prunable[0].name: 16}, "slim")
    (graph,) = (built.graph for built in engines.built)
    weights = [tensor for tensor in graph.initializer if len(tensor.dims) == 4]
    assert {tensor.data_type for tensor in weights} == {kind}
    assert tuple(weights[0].dims) == (16, 3, 3, 3)


def test_int8_graphs_have_the_quantisers_of_the_export(net: nn.Module, channels: ChannelMap):
    graph = OnnxNetworks(net, channels, IMAGES, precision="int8").at({channels.prunable[0].name: 16})
    onnx.checker.check_model(graph, full_check=True)
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("Conv") == 4
    assert kinds.count("QuantizeLinear") == kinds.count("Conv") + kinds.count("Gemm") + kinds.count("MatMul")
    reads = {node.output[0]: node for node in graph.graph.node}
    for node in graph.graph.node:
        if node.op_type == "Conv":
            assert [reads[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
    weights = [tensor for tensor in graph.graph.initializer if len(tensor.dims) == 4]
    assert {tensor.data_type for tensor in weights} == {TensorProto.INT8}


A, B = Factor(0, (("a", 1),)), Factor(0, (("b", 1),))
LAYERS = tuple(EngineLayer(name, "Conv", ((1, 3, 8, 8),) * 3, (A, B)) for name in ("one", "two", "three", "four"))
NAMES = {name: OnnxLayer(name, (A, B)) for name in ("one", "two", "three", "four")}


def test_what_an_engine_does_between_layers_counts_to_the_layer_before():
    times = {
        "Reformatting CopyNode for Input Tensor 0 to one + relu": 0.5,
        "one + relu": 1.0,
        "pool": 0.25,
        "two + PWN(add, relu_1)": 2.0,
        "three": 3.0,
        "four": 4.0,
    }
    nodes = spread_over_layers(times, LAYERS, {**NAMES, "relu": NAMES["one"]})
    assert [(node.name, node.ms) for node in nodes] == [("one", 1.75), ("two", 2.0), ("three", 3.0), ("four", 4.0)]


def test_a_fused_block_is_divided_among_its_layers():
    times = {"one": 1.0, "{ForeignNode[two...three]}": 3.0, "four": 4.0}
    nodes = spread_over_layers(times, LAYERS, NAMES)
    assert [node.ms for node in nodes] == [1.0, 1.5, 1.5, 4.0]
    assert sum(node.ms for node in spread_over_layers({"everything": 8.0}, LAYERS, NAMES)) == 8.0


def test_onnx_runtime_is_timed_whole_and_its_layers_in_pytorch(net: nn.Module, channels: ChannelMap):
    operators = TorchSampler(SlimNetworks(net, channels).at, IMAGES, threads=1, block=8)
    graphs = OnnxNetworks(net, channels, IMAGES)
    sampler = WholeCallSampler("ort-cuda", ort_loader(graphs.at, IMAGES, backend="ort"), operators)
    context = MeasurementContext.here(backend="ort-cuda", threads=1, batch=2, image_shape=(3, 16, 16))
    table = sample_latency(sampler, channels, context, SamplingPlan(networks=8, repeats=1, seconds=0.02))
    assert {name for node in table.nodes for size in node.sizes for name, _ in size.spans} == {
        group.name for group in channels.prunable
    }
    assert 0 < table.predict_ms({group.name: 8 for group in channels.prunable}) < table.predict_ms({})
    assert sum(table.node_ms({})) == pytest.approx(table.predict_ms({}))


def test_onnx_runtime_runs_on_the_gpu_that_is_asked_for(
    net: nn.Module, channels: ChannelMap, monkeypatch: pytest.MonkeyPatch
):
    devices: list[str] = []

    class Runner:
        def __init__(self, name: str, graph: ModelProto, *, threads: int, backend: str, device: str = "cuda") -> None:
            devices.append(device)

        def prepare(self, images: torch.Tensor) -> None:
            pass

    monkeypatch.setattr(whole_call_sampler, "OrtRunner", Runner)
    monkeypatch.setattr(resized_networks, "require_backend_here", lambda backend: None)
    monkeypatch.setattr(resized_networks, "clock_of_backend", lambda backend, device: FakeClock())
    monkeypatch.setattr(resized_networks, "TorchSampler", lambda *_, block, **__: SimpleNamespace(block=block))
    monkeypatch.setattr(Setting, "require_possible", lambda setting, backends: None)
    sampler = make_sampler("ort-cuda", net, channels, IMAGES, threads=1, setting=Setting("cuda:1"))
    for widths in ({}, {channels.prunable[0].name: 8}):
        sampler.runner(widths, "network")
    assert devices == ["cuda:1", "cuda:1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU here")
@pytest.mark.parametrize("backend", ["ort-cuda", "tensorrt"])
def test_without_a_gpu_there_is_one_sentence(backend: str, net: nn.Module, channels: ChannelMap):
    with pytest.raises(MissingError, match=f"measuring on {backend} needs the target GPU") as caught:
        make_sampler(backend, net, channels, IMAGES, threads=1, setting=Setting(precision="fp16"))
    assert "prune.measure.table" in str(caught.value)
    assert str(caught.value).count("\n") < 3


@pytest.mark.parametrize(
    ("backend", "precision", "words"),
    [("ort-cuda", "int8", "no int8 kernels for convolutions"), ("tensorrt", "fp8", "not fp8")],
)
def test_precisions_that_cannot_be_timed_are_refused(
    backend: str, precision: str, words: str, net: nn.Module, channels: ChannelMap
):
    with pytest.raises(UsageError, match=words):
        make_sampler(backend, net, channels, IMAGES, threads=1, setting=Setting(precision=precision))


def test_the_timing_cache_is_of_one_gpu_and_one_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PASSDEPLOY_CACHE", str(tmp_path))
    path = cache_folder.timing_cache_path("NVIDIA H100 80GB HBM3", "tensorrt 10.6.0, CUDA 13.0")
    assert path == tmp_path / "timing-NVIDIA-H100-80GB-HBM3-tensorrt-10.6.0-CUDA-13.0.cache"
