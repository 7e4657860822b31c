from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from passdeploy.errors import MissingError, UsageError
from passdeploy.export import ort_session
from passdeploy.export.ort_session import open_session
from passdeploy.profiling import Setting, runners
from passdeploy.profiling.runners import PROVIDERS, CompiledRunner, OrtRunner, TorchRunner, torch_threads

onnxruntime = pytest.importorskip("onnxruntime", reason="extra cpu is not installed")


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    shape = ("batch", 3, 4, 4)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", "logits")]
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["logits"])], "g", ends[:1], ends[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "relu.onnx"
    )
    return tmp_path / "relu.onnx"


def test_onnx_runtime_runs_the_batch_that_was_bound(relu: Path):
    runner, images = OrtRunner("slim", relu, threads=1), torch.randn(2, 3, 4, 4)
    runner.prepare(images)
    runner.run()
    (output,) = runner._binding.copy_outputs_to_cpu()
    assert torch.equal(torch.from_numpy(output), images.relu())
    assert (runner.backend, runner.artifact, runner.device) == ("ort", "relu.onnx", "cpu")


def test_another_image_size_is_named_before_it_runs(relu: Path):
    with pytest.raises(UsageError, match=r"takes images of shape .* asked was \[1, 3, 8, 8\]"):
        OrtRunner("slim", relu, threads=1).prepare(torch.randn(1, 3, 8, 8))


def test_a_session_has_the_threads_asked_for_and_does_not_spin_when_idle(relu: Path):
    options = open_session(relu, threads=2).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_a_provider_that_is_not_there_is_an_error(relu: Path):
    with pytest.raises(MissingError, match="has no NoSuchExecutionProvider here"):
        open_session(relu, threads=1, provider="NoSuchExecutionProvider")


def test_a_provider_that_was_silently_replaced_is_an_error(relu: Path, monkeypatch: pytest.MonkeyPatch):
    class Replaced(SimpleNamespace):
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    asked: list[list[Any]] = []

    def fake(module: str, extra: str) -> Any:
        return SimpleNamespace(
            __version__="1.0",
            SessionOptions=onnxruntime.SessionOptions,
            get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
            InferenceSession=lambda *_, providers, **__: asked.append(providers) or Replaced(),
        )

    monkeypatch.setattr(ort_session, "require", fake)
    for gpu in (0, 1):
        with pytest.raises(MissingError, match="asked ONNX Runtime for CUDAExecutionProvider, it runs CPU"):
            open_session(relu, threads=1, provider="CUDAExecutionProvider", gpu=gpu)
    assert asked == [["CUDAExecutionProvider"], [("CUDAExecutionProvider", {"device_id": 1})]]


def test_pytorch_runs_a_copy_in_eval_mode_without_gradients():
    seen = []

    class Spy(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, torch.is_inference_mode_enabled(), tuple(images.shape)))
            return images

    module = Spy().train()
    runner = TorchRunner("dense", module)
    runner.prepare(torch.zeros(2, 3, 4, 4))
    runner.run()
    assert seen == [(False, True, (2, 3, 4, 4))]
    assert module.training


def test_thread_counts_are_restored_even_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), torch_threads(before + 1):
        assert_threads_then_fail(before + 1)
    assert torch.get_num_threads() == before


def assert_threads_then_fail(threads: int) -> None:
    assert torch.get_num_threads() == threads
    raise RuntimeError


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_a_gpu_is_timed_on_the_device():
    from passdeploy.profiling.clock import CudaClock, clock_for

    clock = clock_for(torch.device("cuda"))
    matrix = torch.randn(2048, 2048, device="cuda")
    assert isinstance(clock, CudaClock)
    assert clock.time_ms(lambda: matrix @ matrix) > 0


@pytest.mark.parametrize("backend", ["ort-cuda", "ort-trt"])
def test_a_provider_that_is_missing_is_named(backend: str, relu: Path):
    if PROVIDERS[backend] in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the provider")
    with pytest.raises(MissingError, match=rf"has no {PROVIDERS[backend]} here"):
        OrtRunner("slim", relu, threads=1, backend=backend)


class Gpu:
    """A fake session of ONNX Runtime on a GPU, with its binding and values; it records what is bound where."""

    def __init__(self) -> None:
        self.bound: list[Any] = []
        self.OrtValue = SimpleNamespace(ortvalue_from_numpy=lambda array, device, index: (array.shape, device, index))

    def get_modelmeta(self) -> Any:
        return SimpleNamespace(custom_metadata_map={"precision": "fp16"})

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="images", shape=["batch", 3, 4, 4])]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="logits")]

    def io_binding(self) -> Gpu:
        return self

    def bind_ortvalue_input(self, *what: Any) -> None:
        self.bound.append(what)

    def bind_output(self, *what: Any) -> None:
        self.bound.append(what)

    def run_with_iobinding(self, binding: Any) -> None:
        self.bound.append("run")

    def synchronize_outputs(self) -> None:
        self.bound.append("synchronised")


def test_on_a_gpu_nothing_is_copied_while_it_is_timed(monkeypatch: pytest.MonkeyPatch):
    gpu = Gpu()
    monkeypatch.setattr(runners, "open_session", lambda source, **options: gpu)
    monkeypatch.setattr(runners, "require", lambda module, extra: gpu)
    runner = OrtRunner("slim", Path("slim.onnx"), threads=1, backend="ort-cuda")
    runner.prepare(torch.zeros(2, 3, 4, 4))
    runner.run()
    assert gpu.bound == [
        ("images", ((2, 3, 4, 4), "cuda", 0)),
        ("logits", "cuda", 0),
        "run",
        "synchronised",
    ]
    assert (runner.device, runner.precision) == ("cuda", "fp16")  # read from the file


def test_what_cannot_be_compiled_here_is_said(monkeypatch: pytest.MonkeyPatch):
    def compiler(function: object, mode: str | None, dynamic: bool) -> object:
        def run(images: object) -> None:
            raise RuntimeError("no C++ compiler")

        return run

    monkeypatch.setattr(torch, "compile", compiler)
    with pytest.raises(MissingError, match="cannot compile Identity here: no C"):
        CompiledRunner("dense", nn.Identity()).prepare(torch.zeros(1, 3, 4, 4))


def test_a_network_stays_compiled_when_others_of_its_class_are_compiled(monkeypatch: pytest.MonkeyPatch):
    from torch._dynamo.utils import counters

    compiler = torch.compile  # without its code generator, which takes seconds
    monkeypatch.setattr(torch, "compile", lambda f, mode, dynamic: compiler(f, backend="eager", dynamic=dynamic))
    images, runners = torch.randn(2, 3, 4, 4), list[CompiledRunner]()
    counters.clear()
    for width in range(2, 14):  # more than the compiler keeps variants of one function
        runners.append(CompiledRunner("network", nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU())))
        runners[-1].prepare(images)
        runners[0].run()
    assert counters["stats"]["unique_graphs"] == len(runners)
    assert runners[0]._compiled(images).shape == (2, 2, 4, 4)
    larger = CompiledRunner("larger batch", runners[0].module)
    larger.prepare(torch.randn(5, 3, 4, 4))
    assert larger._compiled(torch.randn(5, 3, 4, 4)).shape == (5, 2, 4, 4)


def test_the_compiler_captures_its_own_graph(monkeypatch: pytest.MonkeyPatch):
    modes: list[str | None] = []
    calls: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function, mode, dynamic: modes.append(mode) or calls.append)
    for cuda_graph in (False, True):
        CompiledRunner("dense", nn.Identity(), setting=Setting(cuda_graph=cuda_graph)).prepare(torch.zeros(1))
    assert modes == [None, "reduce-overhead"]
    assert len(calls) == 1 + 3  # it is captured in its second call, and replayed from its third on
