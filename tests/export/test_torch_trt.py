"""Tests of Torch-TensorRT without it, and with a stand-in, since it needs a GPU even to be imported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passdeploy.errors import MissingError, ParityError, UsageError
from passdeploy.export import EngineOptions, torch_trt
from passdeploy.export.precision import LIMITS
from passdeploy.export.torch_trt import compile_program, compile_settings, load_torch_trt, partition_report
from passdeploy.runtime import cuda_driver
from passdeploy.runtime.cuda_driver import Driver

from .nets import SmallNet, small_net


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "probe_driver", lambda: Driver((13, 2), ("Imaginary GPU",)))


def imported_as(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    def importing(name: str) -> Any:
        if isinstance(module, BaseException):
            raise module
        return module

    monkeypatch.setattr(torch_trt, "import_module", importing)


def test_without_a_driver_it_is_not_even_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_driver, "probe_driver", lambda: None)
    imported_as(monkeypatch, AssertionError("it was imported"))
    with pytest.raises(MissingError, match="passdeploy export --torch-trt"):
        load_torch_trt()


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'torch_tensorrt'", name="torch_tensorrt"), "is not installed"),
        (Exception("import error when try to import _TensorRTProxyModule"), r"_TensorRTProxyModule\nHere: torch "),
        (OSError("libtorchtrt.so: undefined symbol"), "Made for each other: torch 2.14, torch-tensorrt 2.14"),
        (RuntimeError("Found no NVIDIA driver on your system"), "does not load"),
    ],
)
def test_whatever_its_import_raises_is_explained(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch):
    imported_as(monkeypatch, error)
    with pytest.raises(MissingError, match=words) as caught:
        load_torch_trt()
    assert caught.value.exit_code == 3
    assert str(caught.value).count("\n") < 3


def test_precision_is_autocast_and_every_keyword_is_a_known_one():
    assert "enable_autocast" not in compile_settings("fp32", EngineOptions())
    settings = compile_settings("bf16", EngineOptions(workspace_bytes=7, refittable=True, timing_cache=Path("cache")))
    assert settings["autocast_low_precision_type"] == torch.bfloat16
    assert not settings["immutable_weights"]
    with pytest.raises(UsageError, match="--weight-stripped is for engines"):
        compile_settings("fp32", EngineOptions(weight_stripped=True))
    assert (settings["workspace_size"], settings["timing_cache_path"]) == (7, "cache")


class Part(nn.Module):
    def __init__(self, operations: int) -> None:
        super().__init__()
        self.operations = operations

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.operations):
            x = torch.cumsum(x, 1)
        return x


class Partitioned(nn.Module):
    """A compiled program of two engines, one part between them that stayed in PyTorch, and one operation outside."""

    def __init__(self) -> None:
        super().__init__()
        self._run_on_acc_0, self._run_on_acc_2 = nn.ReLU(), nn.ReLU()
        self._run_on_gpu_1 = torch.fx.symbolic_trace(Part(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.neg(self._run_on_acc_2(self._run_on_gpu_1(self._run_on_acc_0(x))))


class Whole(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def test_what_stayed_in_pytorch_is_counted():
    root = Partitioned()
    report = partition_report(torch.fx.GraphModule(root, Whole().trace(root)))
    assert report == {
        "engines": 2,
        "torch_parts": 1,
        "torch_operations": 4,
        "torch_operators": {"cumsum": 3, "neg": 1},
    }


class StandIn:
    """A stand-in for `torch_tensorrt` that compiles nothing, and saves the program (with other weights if `wrong`)."""

    def __init__(self, wrong: bool = False) -> None:
        self.dynamo = SimpleNamespace(compile=self.compile)
        self.wrong, self.keywords = wrong, dict[str, Any]()

    def Input(self, **shapes: Any) -> Any:
        return SimpleNamespace(**shapes)

    def compile(self, program: torch.export.ExportedProgram, arg_inputs: list[Any], **keywords: Any) -> nn.Module:
        self.keywords, self.program, self.input = keywords, program, arg_inputs[0]
        return program.module()

    def save(self, compiled: nn.Module, path: str, output_format: str, arg_inputs: list[Any]) -> None:
        if self.wrong:
            with torch.no_grad():
                next(iter(self.program.state_dict.values())).mul_(2)
        torch.export.save(self.program, path)

    def load(self, path: str) -> torch.export.ExportedProgram:
        return torch.export.load(path)


@pytest.mark.usefixtures("a_gpu")
class TestWithAStandIn:
    @pytest.fixture(autouse=True)
    def cuda_is_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for kind in (nn.Module, Tensor):
            monkeypatch.setattr(kind, "cuda", lambda self: self)

    def test_a_program_is_saved_compared_and_described(
        self, net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        stand_in = StandIn()
        imported_as(monkeypatch, stand_in)
        path = tmp_path / "model-fp16.pt2"
        artifact = compile_program(net, images, path, precision="fp16", batch=(1, 2, 4), limits=LIMITS["fp16"])
        assert stand_in.keywords["enable_autocast"]
        assert stand_in.input.max_shape == (4, 3, 16, 16)
        assert artifact.facts["parity"]["batch_sizes"] == [1, 2, 4]
        assert artifact.facts["torch_operations"] > 0  # the stand-in left everything in PyTorch
        loaded = torch.export.load(path).module()
        torch.testing.assert_close(loaded(images[:3]), net(images[:3]))

    def test_a_program_that_was_saved_as_something_else_is_set_aside(
        self, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        imported_as(monkeypatch, StandIn(wrong=True))
        with pytest.raises(ParityError, match="do not deploy it"):
            compile_program(small_net(), images, tmp_path / "model.pt2", batch=(1, 2, 4), limits=LIMITS["fp32"])
        assert [path.name for path in tmp_path.iterdir()] == ["model.pt2.rejected"]
