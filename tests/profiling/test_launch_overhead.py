from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from passdeploy.profiling import launch_overhead
from passdeploy.profiling.launch_overhead import launch_note
from passdeploy.profiling.runners import OrtRunner, Runner, TorchRunner
from tests.profiling.fakes import FakeClock, FakeRunner

onnxruntime = pytest.importorskip("onnxruntime", reason="extra cpu is not installed")
IMAGES = torch.zeros(1, 3, 4, 4)


def prepared(runner: Runner) -> Runner:
    runner.prepare(IMAGES)
    return runner


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    nodes = [helper.make_node("Neg", [f"x{n}"], [f"x{n + 1}"]) for n in range(5)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 3, 4, 4)) for name in ("x0", "x5")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "chain.onnx")
    return tmp_path / "chain.onnx"


def test_kernels_are_counted_as_they_are_called(chain: Path):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    assert launch_overhead._count_kernels(prepared(OrtRunner("slim", chain, threads=1))) == 5
    assert (
        launch_overhead._count_kernels(prepared(TorchRunner("slim", net))) == 3
    )  # flattening looks at the same memory
    assert launch_overhead._count_kernels(FakeRunner("slim", FakeClock(), 1.0)) == 0


@pytest.mark.parametrize("backend", ["torch", "ort"])
def test_a_call_costs_something(backend: str):
    assert 1e-5 < launch_overhead._launch_ms(backend) < 1.0


def test_many_kernels_with_little_to_do_are_bound_by_their_calls(chain: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch_overhead, "_launch_ms", lambda backend: 0.002)
    runner = prepared(OrtRunner("slim", chain, threads=1))
    assert launch_note(runner, 0.015, None).startswith("launch-bound: calling its 5 kernels costs 0.01 ms")
    assert launch_note(runner, 1.0, None) == ""


def test_on_a_device_queueing_decides():
    runner = FakeRunner("slim", FakeClock(), 1.0)
    assert launch_note(runner, 1.0, 0.79) == ""
    assert "--cuda-graph" in launch_note(runner, 1.0, 0.81)
