from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch._C._autograd import DeviceType

from passdeploy.errors import RunError, UsageError
from passdeploy.profiling import Candidate, layer_traces
from passdeploy.profiling.layer_times import ELSEWHERE, weighted_nodes
from passdeploy.profiling.layer_traces import (
    _is_kernel,
    first_traceable,
    merge_trt_layers,
    trace_engine_layers,
    trace_layers,
    trace_module_layers,
)
from passdeploy.profiling.runners import CompiledRunner, TorchRunner

IMAGES = torch.randn(2, 3, 16, 16)


class Net(nn.Module):
    """A network with two layers of one shape, a depthwise one, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.third, self.depth = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.twice, self.norm, self.fc = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.third(self.second(self.first(images)).relu()))
        x = self.twice(self.twice(self.depth(x)).relu())
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "backend"), [(TorchRunner, "torch"), (CompiledRunner, "compile")])
def test_layers_of_a_module_are_told_apart(kind: type[TorchRunner], backend: str):
    if backend == "compile":
        try:
            CompiledRunner("slim", nn.ReLU()).prepare(IMAGES)
        except Exception:
            pytest.skip("torch.compile finds no C++ compiler here")
    layers = trace_module_layers(kind("slim", Net().eval()), IMAGES, calls=3)
    assert [layer.name for layer in layers] == ["first", "second", "third", "depth", "twice", "fc", ELSEWHERE]
    assert [layer.is_depthwise for layer in layers] == [layer.name == "depth" for layer in layers]
    assert all(layer.ms > 0 for layer in layers)
    assert layers[1].weight == (8, 8, 3, 3)


def test_every_backend_is_traced_by_its_own_profiler():
    candidate = Candidate("slim", module=Net())
    assert trace_layers(candidate, "torch", IMAGES, threads=1)[0].name == "first"
    with pytest.raises(UsageError, match="looks into torch, compile, ort, tensorrt, not into ort-cuda"):
        trace_layers(candidate, "ort-cuda", IMAGES, threads=1)
    with pytest.raises(UsageError, match="no form that ort can run"):
        trace_layers(candidate, "ort", IMAGES, threads=1)


def graph_of(cast: bool) -> Any:
    """Build a convolution whose weight may be cast, a ReLU and a depthwise convolution."""
    weights = {
        name: torch.zeros(shape).numpy() for name, shape in (("a.weight", (8, 3, 3, 3)), ("b.weight", (8, 1, 3, 3)))
    }
    nodes = [
        helper.make_node("Conv", ["images", "cast" if cast else "a.weight"], ["x"], name="conv_1"),
        helper.make_node("Relu", ["x"], ["y"], name="relu_1"),
        helper.make_node("Conv", ["y", "b.weight"], ["z"], name="conv_2", group=8),
    ]
    if cast:
        nodes.insert(0, helper.make_node("Cast", ["a.weight"], ["cast"], name="cast_1", to=TensorProto.FLOAT16))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("images", "z")]
    return helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(array, name) for name, array in weights.items()]
    )


@pytest.mark.parametrize("cast", [False, True])
def test_layers_of_an_engine_carry_the_names_of_nodes(cast: bool):
    times = {
        "Reformatting CopyNode for Input Tensor 0 to conv_1": 0.1,
        "conv_1 + relu_1": 0.5,
        "conv_2": 0.25,
        "[copy]": 0.05,
    }
    layers = merge_trt_layers(times, weighted_nodes(graph_of(cast)))
    assert [(layer.name, layer.weight[0], layer.is_depthwise) for layer in layers[:2]] == [
        ("a", 8, False),
        ("b", 8, True),
    ]
    assert [layer.ms for layer in layers] == [0.5, 0.25, pytest.approx(0.15)]
    assert layers[2].name == ELSEWHERE


def test_the_first_backend_that_has_a_tracer_is_traced():
    assert first_traceable(("ort-cuda", "torch-trt", "tensorrt", "torch")) == "tensorrt"
    with pytest.raises(UsageError, match=r"not into ort-cuda, torch-trt\.\nAdd one of them to --backend"):
        first_traceable(("ort-cuda", "torch-trt"))


class FakeEngine:
    """A runner of an engine that keeps the images it is prepared with."""

    def __init__(self, path: Path) -> None:
        self.path, self.images = path, torch.empty(0)

    def prepare(self, images: Tensor, *others: Tensor) -> None:
        self.images = images


def test_layers_of_an_engine_are_read_from_the_file_it_was_built_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runner: Any = FakeEngine(tmp_path / "model.engine")
    monkeypatch.setattr(layer_traces, "read_sidecar", lambda path: {"onnx": "model.onnx", "precision": "fp16"})
    monkeypatch.setattr(layer_traces, "time_engine_layers", lambda runner: {"conv_1": 0.5})
    with pytest.raises(RunError, match=r"built from: model\.onnx, which is gone\.\n.* --precision fp16 --run /"):
        trace_engine_layers(runner, IMAGES)
    (tmp_path / "model.onnx").write_bytes(helper.make_model(graph_of(False)).SerializeToString())
    assert [layer.name for layer in trace_engine_layers(runner, IMAGES)] == ["a", ELSEWHERE]
    assert runner.images is IMAGES


def test_the_time_of_a_gpu_is_counted_once():
    operator = SimpleNamespace(device_type=DeviceType.CPU, is_user_annotation=False)  # has its kernel's time as well
    kernel = SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=False)
    annotation = SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=True)
    assert [_is_kernel(event) for event in (operator, kernel, annotation)] == [False, True, False]


def test_the_times_of_layers_on_a_gpu_add_up_to_what_its_kernels_take(monkeypatch: pytest.MonkeyPatch):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())

    def event(name: str, device: DeviceType, *, total_us: float, own_us: float, is_range: bool = False) -> Any:
        return SimpleNamespace(
            name=name,
            device_type=device,
            device_time_total=total_us,
            self_device_time_total=own_us,
            is_user_annotation=is_range,
            input_shapes=[[2, 3, 16, 16], [8, 3, 3, 3]] if name == "aten::convolution" else [],
        )

    of_a_call = [
        event("aten::conv2d", DeviceType.CPU, total_us=100, own_us=0),
        event("aten::convolution", DeviceType.CPU, total_us=100, own_us=100),
        event("aten::relu", DeviceType.CPU, total_us=40, own_us=40),
        event("sm90_conv", DeviceType.CUDA, total_us=100, own_us=100),
        event("elementwise", DeviceType.CUDA, total_us=40, own_us=40),
        event("a range that covers both", DeviceType.CUDA, total_us=140, own_us=140, is_range=True),
    ]
    traced = nullcontext(SimpleNamespace(events=lambda: 2 * of_a_call))
    monkeypatch.setattr(layer_traces, "profile", lambda **_: traced)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    runner: Any = SimpleNamespace(
        module=net, images=IMAGES, device="cuda", prepare=lambda images: None, run=lambda: None
    )
    times = {layer.name: layer.ms for layer in trace_module_layers(runner, IMAGES, calls=2)}
    assert times == {"0": pytest.approx(0.1), ELSEWHERE: pytest.approx(0.04)}
