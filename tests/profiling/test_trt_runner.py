"""TensorRT engines are bound, checked and run, with a fake TensorRT on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from passdeploy.errors import ExportError, MissingError, UsageError
from passdeploy.export import trt_binding
from passdeploy.export.artifact import describe_artifact
from passdeploy.export.trt_sidecar import write_sidecar
from passdeploy.profiling import trt_runner
from passdeploy.profiling.trt_runner import EngineRunner, read_input, time_engine_layers


class Context:
    """A fake execution context that records its calls and fails on demand."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.shapes, self.addresses = engine, dict[str, tuple[int, ...]](), dict[str, int]()
        self.calls, self.reports = list[int](), 0
        self.profiler: Any = None
        self.enqueue_emits_profile = True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address != 0

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shapes["images"][0], 10)

    def infer_shapes(self) -> list[str]:
        return self.engine.missing

    def execute_async_v3(self, stream: int) -> bool:
        self.calls.append(stream)
        return not self.engine.fails

    def report_to_profiler(self) -> bool:
        assert not self.enqueue_emits_profile
        self.reports += 1
        self.profiler.report_layer_time("conv + relu", 0.5 + 0.1 * (self.reports % 3))
        self.profiler.report_layer_time("fc", 0.1)
        return True


class Engine:
    """A fake engine that takes 1 to 8 images of 3 x 4 x 4."""

    num_io_tensors = 2

    def __init__(self, *, batch: int = -1, kind: str = "FLOAT") -> None:
        self.batch, self.kind, self.fails, self.missing = batch, kind, False, list[str]()
        self.context: Context | None = Context(self)

    def get_tensor_name(self, index: int) -> str:
        return ("images", "logits")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "images" else "out"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.batch, 3, 4, 4)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [(size, 3, 4, 4) for size in (1, 2, 8)]

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.kind)

    def create_execution_context(self) -> Context | None:
        return self.context


TRT = SimpleNamespace(TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"), IProfiler=type("IProfiler", (), {}))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Load a fake engine and let the CPU stand in for the GPU."""
    made = Engine()
    monkeypatch.setattr(trt_runner, "load_engine", lambda path, trust_engine: (TRT, made))
    monkeypatch.setattr(trt_runner, "require_gpu_of_torch", lambda what: None)
    monkeypatch.setattr(trt_runner, "capture_graph", lambda work, what: lambda: made.context.calls.append(-1))  # type: ignore[union-attr]
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "model-fp16.engine"
    found.write_bytes(b"a plan")
    write_sidecar(describe_artifact(found, kind="engine", precision="fp16", facts={"onnx": "model-fp16.onnx"}))
    return found


def runner_on(path: Path, **options: Any) -> EngineRunner:
    return EngineRunner("slim", path, device="cpu", **options)


def outputs_of(runner: EngineRunner) -> dict[str, Tensor]:
    assert runner.bound is not None
    return runner.bound.outputs


def test_tensors_are_bound_by_name_and_a_call_is_queued_on_the_current_stream(engine: Engine, path: Path):
    runner, images = runner_on(path), torch.randn(2, 3, 4, 4)
    runner.prepare(images)
    context = engine.context
    assert context is not None
    assert context.shapes == {"images": (2, 3, 4, 4)}
    assert context.addresses["logits"] == outputs_of(runner)["logits"].data_ptr()
    assert outputs_of(runner)["logits"].shape == (2, 10)
    assert context.calls == [7]  # its first call sets it up
    runner.run()
    runner.run()
    assert context.calls == [7, 7, 7]
    assert (runner.backend, runner.artifact, runner.precision) == ("tensorrt", "model-fp16.engine", "fp16")


def test_with_a_graph_a_call_is_a_replay(engine: Engine, path: Path):
    runner = runner_on(path, cuda_graph=True)
    runner.prepare(torch.zeros(1, 3, 4, 4))
    runner.run()
    assert engine.context is not None
    assert engine.context.calls == [7, -1]


def test_the_types_of_tensors_are_the_engines(engine: Engine, path: Path):
    engine.kind = "HALF"
    runner = runner_on(path)
    runner.prepare(torch.zeros(1, 3, 4, 4))
    assert outputs_of(runner)["logits"].dtype == torch.float16
    engine.kind = "FP4"
    with pytest.raises(UsageError, match="is FP4, which PyTorch cannot hold"):
        runner_on(path).prepare(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("batch", "shape", "words"),
    [
        (-1, (9, 3, 4, 4), "built for batches of 1 to 8; asked was 9, outside its optimisation profile"),
        (4, (1, 3, 4, 4), "built for batches of 4; asked was 1"),
        (-1, (1, 3, 8, 8), "takes images of 3 x 4 x 4, asked was 3 x 8 x 8"),
    ],
)
def test_what_it_was_not_built_for_is_refused(
    batch: int, shape: tuple[int, ...], words: str, engine: Engine, path: Path
):
    engine.batch = batch
    with pytest.raises(UsageError, match=words) as caught:
        runner_on(path).prepare(torch.zeros(shape))
    assert str(caught.value).count("\n") < 3


def test_what_tensorrt_refuses_is_an_error(engine: Engine, path: Path):
    engine.fails = True
    with pytest.raises(ExportError, match="TensorRT refuses the call"):
        runner_on(path).prepare(torch.zeros(1, 3, 4, 4))
    engine.missing = ["images"]
    with pytest.raises(ExportError, match="still waits for images"):
        runner_on(path).prepare(torch.zeros(1, 3, 4, 4))
    engine.context = None
    with pytest.raises(ExportError, match="cannot start"):
        runner_on(path).prepare(torch.zeros(1, 3, 4, 4))


def test_an_engine_says_what_it_takes(engine: Engine, path: Path):
    found = read_input(path)
    assert (found.name, found.image, found.smallest, found.largest) == ("images", (3, 4, 4), 1, 8)
    engine.num_io_tensors = 0  # type: ignore[misc]
    with pytest.raises(UsageError, match="has 0 inputs"):
        read_input(path)


def test_tensorrts_profiler_times_layers(engine: Engine, path: Path):
    runner = runner_on(path)
    runner.prepare(torch.zeros(1, 3, 4, 4))
    assert time_engine_layers(runner, calls=9) == {"conv + relu": pytest.approx(0.6), "fc": pytest.approx(0.1)}
    assert engine.context is not None
    assert engine.context.profiler is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU here")
def test_without_a_gpu_it_is_missing():
    with pytest.raises(MissingError, match=r"x\.engine runs on an NVIDIA GPU"):
        trt_binding.require_gpu_of_torch("x.engine")
