"""Latency samplers of ONNX Runtime and PyTorch, and layer times, measured on a small network."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from passdeploy.channels.costs import Factor
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.display.tables import layer_table
from passdeploy.errors import MissingError, UsageError
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.grouping.find import map_channels
from passdeploy.latency.cache_folder import cache_folder
from passdeploy.latency.find_table import find_table
from passdeploy.latency.measurement_context import MeasurementContext, block_of
from passdeploy.latency.network_timing import LatencySampler, NetworkTiming, merge_timings
from passdeploy.latency.resized_networks import make_sampler
from passdeploy.latency.sampling import SamplingPlan, sample_latency
from passdeploy.latency.table import LatencyTable
from passdeploy.latency.torch_sampler import OperatorTimer
from passdeploy.profiling import Setting
from passdeploy.profiling.layer_times import ELSEWHERE, LayerTime, by_group, compare_layers, trace_onnx_layers
from passdeploy.profiling.runners import CompiledRunner, TorchRunner
from passdeploy.runtime.events import Event, Warned
from passdeploy.slimming.slim import slim
from tests.profiling.fakes import FakeClock

pytest.importorskip("onnxruntime", reason="extra cpu is not installed")

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Wide(nn.Module):
    """A network wide enough that its layers take longer than their launches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.second, self.third = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        return self.fc((x + self.third(self.second(x).relu())).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Wide().eval()


@pytest.fixture(scope="module")
def channels(net: nn.Module) -> ChannelMap:
    return map_channels(net, IMAGES[:1])


@pytest.fixture(scope="module")
def sampler(net: nn.Module, channels: ChannelMap) -> LatencySampler:
    return make_sampler("ort", net, channels, IMAGES, threads=1)


def test_onnx_runtime_times_every_layer_and_knows_its_widths(sampler: LatencySampler):
    dense, narrow = sampler.measure({}, seconds=0.05), sampler.measure({"second": 16}, seconds=0.05)
    sizes = [node.sizes for node in dense.nodes if node.sizes]
    first, second = Factor(0, (("first", 1),)), Factor(0, (("second", 1),))
    assert sizes == [(first,), (second, first), (first, second), (first,)]
    assert [node.sizes for node in narrow.nodes if node.sizes] == sizes  # under the same names, whatever ran
    assert {n.name for n in dense.nodes if n.sizes} == {n.name for n in narrow.nodes if n.sizes}
    assert 0 < sum(node.ms for node in dense.nodes) < 10 * dense.total_ms


def test_pytorch_times_every_operator(net: nn.Module, channels: ChannelMap):
    before = torch.get_num_threads()
    timing = make_sampler("torch", net, channels, IMAGES, threads=1).measure({"second": 16}, seconds=0.05)
    kinds = [node.kind.split(".")[1] for node in timing.nodes]
    assert kinds.count("conv2d") == 3
    assert timing.nodes[0].shapes[:2] == ((2, 3, 16, 16), (32, 3, 3, 3))
    assert timing.total_ms > 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_a_table_of_a_real_network_knows_its_groups(
    backend: str, sampler: LatencySampler, net: nn.Module, channels: ChannelMap
):
    if backend == "torch":
        sampler = make_sampler(backend, net, channels, IMAGES, threads=1)
    context = MeasurementContext.here(backend=backend, threads=1, batch=2, image_shape=(3, 16, 16))
    table = sample_latency(sampler, channels, context, SamplingPlan(networks=10, repeats=1, seconds=0.02))
    followed = {name for node in table.nodes for size in node.sizes for name, _ in size.spans}
    assert followed == {"first", "second"}
    assert table.predict_ms({"first": 16, "second": 16}) < table.predict_ms({})


def test_a_table_is_measured_once_and_then_found(net: nn.Module, channels: ChannelMap, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PASSDEPLOY_CACHE", str(tmp_path))
    context = MeasurementContext.here(backend="torch", threads=1, batch=2, image_shape=(3, 16, 16))
    plan = SamplingPlan(networks=8, repeats=1, seconds=0.01)
    first = find_table(context, net, channels, IMAGES, plan=plan)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr("passdeploy.latency.find_table.make_sampler", None)  # measuring again would fail
    assert find_table(context, net, channels, IMAGES).predict_ms({}) == pytest.approx(first.predict_ms({}), rel=1e-3)
    file.write_text("{")
    with pytest.raises(TypeError):
        find_table(context, net, channels, IMAGES)  # a damaged one is measured again


def test_a_table_that_cannot_be_kept_serves_all_the_same(
    net: nn.Module, channels: ChannelMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PASSDEPLOY_CACHE", str(tmp_path / "file" / "cache"))
    context = MeasurementContext.here(backend="torch", threads=1, batch=2, image_shape=(3, 16, 16))
    events: list[Event] = []
    plan = SamplingPlan(networks=8, repeats=1, seconds=0.01)
    assert find_table(context, net, channels, IMAGES, plan=plan, listener=events.append).dense_ms > 0
    (warning,) = (event.text for event in events if isinstance(event, Warned))
    assert re.match(r"the table is not kept for the next run: .*file/cache cannot be written to \(Not a dir", warning)


def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch: pytest.MonkeyPatch):
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("PASSDEPLOY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(MissingError, match="PASSDEPLOY_CACHE"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/passdeploy")


@pytest.mark.parametrize(
    ("backend", "setting", "error", "words"),
    [
        ("torch-trt", Setting(), UsageError, "no latency table can be measured on torch-trt"),
        ("ort", Setting(precision="fp16"), UsageError, "ONNX Runtime's latency tables on the CPU are in fp32"),
        ("ort", Setting(device="cuda"), UsageError, "choose the backend ort-cuda or tensorrt"),
        ("torch", Setting(cuda_graph=True), UsageError, "--cuda-graph needs a GPU"),
        pytest.param(
            *("torch", Setting(device="cuda"), MissingError, "asked for cuda, but 0 NVIDIA GPUs"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU here"),
        ),
    ],
)
def test_no_table_of_what_cannot_be_traced(
    backend: str, setting: Setting, error: type[Exception], words: str, net: nn.Module, channels: ChannelMap
):
    with pytest.raises(error, match=words):
        make_sampler(backend, net, channels, IMAGES, threads=1, setting=setting)


def test_a_table_in_another_precision_and_layout(net: nn.Module, channels: ChannelMap):
    setting = Setting(precision="bf16", channels_last=True)
    sampler = make_sampler("torch", net, channels, IMAGES, threads=1, setting=setting)
    runner = sampler.runner({"second": 16}, "slim")
    assert runner.images.dtype == torch.bfloat16
    assert runner.images.is_contiguous(memory_format=torch.channels_last)
    assert runner.module.second.weight.shape[0] == 16
    context = MeasurementContext.here(backend="torch", threads=1, batch=2, image_shape=(3, 16, 16), setting=setting)
    assert context.setting == setting
    assert context.description == "torch, bf16, channels-last, batch 2, 1 thread"
    table = sample_latency(sampler, channels, context, SamplingPlan(networks=8, repeats=1, seconds=0.01))
    again = LatencyTable.from_json(table.to_json())
    assert again.context == context
    usual = MeasurementContext.here(backend="torch", threads=1, batch=2, image_shape=(3, 16, 16))
    assert [words.partition(":")[0] for words in again.context.differences(usual)] == ["precision", "channels_last"]


def test_a_compiled_network_is_timed_whole_and_its_operators_in_eager_mode(net: nn.Module, channels: ChannelMap):
    sampler = make_sampler("compile", net, channels, IMAGES, threads=1)
    runner = sampler.runner({}, "dense")
    assert isinstance(runner, CompiledRunner)
    timed: list[str] = []
    runner.run_eagerly = lambda: timed.append("eagerly") or TorchRunner.run_eagerly(runner)  # type: ignore[func-returns-value]
    sampler.runner = lambda widths, name: runner
    timing = sampler.measure({}, seconds=0.01)
    assert [node.kind.split(".")[1] for node in timing.nodes].count("conv2d") == 3
    assert timed
    assert timing.total_ms > 0


def test_a_gpu_is_told_by_its_name_and_by_what_it_can_compute(monkeypatch: pytest.MonkeyPatch):
    fake = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_capability=lambda device: (9, 0),
        get_device_name=lambda device: f"GPU {device.index or 0}",
    )
    monkeypatch.setattr(
        "passdeploy.latency.measurement_context.torch", SimpleNamespace(cuda=fake, version=torch.version)
    )

    def here(device: str) -> MeasurementContext:
        return MeasurementContext.here(
            backend="torch", threads=1, batch=8, image_shape=(3, 8, 8), setting=Setting(device=device, cuda_graph=True)
        )

    assert (here("cuda:1").processor, here("cuda:1").instructions) == ("GPU 1", "sm_90")
    assert here("cuda:1").description == "torch on GPU 1, cuda-graph, batch 8"
    assert here("cuda:1").differences(here("cuda")) == ["processor: made with GPU 1, wanted is GPU 0"]
    assert here("cuda:2").processor == "no such GPU"
    assert not here("cuda").differences(here("cuda:0"))  # the same GPU by another name


def test_operators_on_a_gpu_are_read_once_the_call_is_over():
    log: list[str] = []

    class Clock(FakeClock):
        """The clock of a device that runs the steps only after the host has queued all of them."""

        def delay_device(self, ms: float) -> None:
            log.append(f"hold {ms:g}")

        def time_step(self, work: Callable[[], object]) -> Callable[[], float]:
            work()
            self.seconds += 0.001  # of the host, for a launch
            log.append("queued")
            return lambda: log.append("read") or 7.0  # type: ignore[func-returns-value]

    timer = OperatorTimer(Clock())
    for _ in range(2):
        timer.time(lambda: torch.ones(3).sin().cos())
    assert log == [*("hold 0", *["queued"] * 3, *["read"] * 3), *("hold 4.5", *["queued"] * 3, *["read"] * 3)]
    assert [(node.name, node.ms) for node in timer.nodes()][1:] == [
        ("/aten.sin.default.0", 7.0),
        ("/aten.cos.default.0", 7.0),
    ]


def test_of_two_timings_the_undisturbed_one_counts():
    slow, fast = NetworkTiming({}, 3.0, ()), NetworkTiming({}, 2.0, ())
    assert merge_timings(slow, fast).total_ms == 2.0


def test_blocks_are_those_of_the_vectors_and_of_the_precision(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("passdeploy.latency.measurement_context.cpu_flags", lambda: frozenset({"avx2", "avx512f"}))
    assert block_of("ort") == block_of("torch") == 16
    assert (block_of("ort", Setting(precision="int8")), block_of("tensorrt", Setting(precision="fp16"))) == (32, 8)
    assert block_of("torch", Setting(device="cuda")) == block_of("torch", Setting(precision="bf16")) == 8
    monkeypatch.setattr("passdeploy.latency.measurement_context.cpu_flags", lambda: frozenset({"avx2"}))
    assert (block_of("ort"), block_of("torch")) == (8, 8)


def test_layers_of_two_files_are_laid_side_by_side(net: nn.Module, channels: ChannelMap, tmp_path: Path):
    plan = Plan({"second": tuple(range(20))})
    for name, network in (("dense", net), ("slim", slim(net, channels.groups, plan))):
        export_onnx(network, IMAGES[:1], tmp_path / f"{name}.onnx", batch=(1, 2, 4))
    dense, cut = (
        trace_onnx_layers(tmp_path / f"{name}.onnx", IMAGES, threads=1, seconds=0.05) for name in ("dense", "slim")
    )
    changes = compare_layers(dense, cut, block=16, groups=channels.groups)
    assert [change.name for change in changes] == ["first", "second", "third", "fc", ELSEWHERE]
    assert changes[1].dense_channels == (64, 32)
    assert changes[1].slim_channels == (20, 32)
    rows = by_group(changes)
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    second = next(row for row in rows if row["group"] == "second")
    assert (second["layers"], second["dense_width"], second["slim_width"]) == (["second"], 64, 20)
    assert [row["slim_ms"] for row in rows] == sorted((row["slim_ms"] for row in rows), reverse=True)


def test_layers_behind_a_visual_prompt_are_found():
    before, after = LayerTime("a", (8, 8, 1, 1), False, 1.0), LayerTime("network.a", (4, 8, 1, 1), False, 0.5)
    (change,) = compare_layers([before], [after], block=8)
    assert (change.name, change.slim_ms) == ("a", 0.5)


def test_layers_that_went_with_a_block_are_listed_as_gone():
    dense = [LayerTime("stem", (8, 3), False, 1.0), *(LayerTime(f"1.{n}", (8, 8), False, 2.0) for n in "ab")]
    changes = compare_layers(dense, [LayerTime("stem", (8, 3), False, 1.0)], block=8, gone=["1"])
    assert [(one.name, one.slim_ms, one.slim_channels) for one in changes[1:]] == [("1.a", 0.0, ()), ("1.b", 0.0, ())]
    assert {row["group"]: row["slim_width"] for row in by_group(changes)} == {"stem": 8, "1.a": None, "1.b": None}
    rows = layer_table([change.to_json() for change in changes]).rows
    assert [row[1] for row in rows] == ["8×3", "8×8 → gone", "8×8 → gone"]
    assert len(compare_layers(dense, dense[:1], block=8)) == 1  # it is not known where the others are


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            LayerTime("a", (64, 64, 3, 3), False, 1.0),
            LayerTime("a", (20, 64, 3, 3), False, 0.5),
            "20 channels are comp",
        ),
        (LayerTime("a", (64, 1, 3, 3), True, 1.0), LayerTime("a", (16, 1, 3, 3), True, 0.9), "depthwise"),
        (
            LayerTime("a", (64, 64, 1, 1), False, 0.01),
            LayerTime("a", (16, 64, 1, 1), False, 0.009),
            "launch-bound: as short as",
        ),
        (LayerTime("a", (64, 64, 1, 1), False, 1.0), LayerTime("a", (16, 64, 1, 1), False, 0.9), "bound by memory"),
        (LayerTime("a", (64, 64, 1, 1), False, 1.0), LayerTime("a", (32, 64, 1, 1), False, 0.5), ""),
        (LayerTime("a", (64, 64, 1, 1), False, 1.0), LayerTime("a", (64, 64, 1, 1), False, 1.0), ""),
    ],
)
def test_why_a_layer_is_no_faster(before: LayerTime, after: LayerTime, words: str):
    (change,) = compare_layers([before], [after], block=16)
    assert change.why.startswith(words)
    assert bool(change.why) == bool(words)
