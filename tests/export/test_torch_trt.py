"""Tests of what surrounds Torch-TensorRT, without it: reports, options, and the comparison on a GPU with a stand-in.

test_torch_trt_real.py compiles with the real one, which runs nothing, since that takes a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passdeploy.errors import ExportError, ParityError, UsageError
from passdeploy.export import (
    EngineOptions,
    ExportSettings,
    Samples,
    export_artifacts,
    exporter,
    torch_trt,
    torch_trt_release,
)
from passdeploy.export.precision import LIMITS
from passdeploy.export.reference import Reference, compute_reference
from passdeploy.export.torch_trt import compile_program, compile_settings, preview_program
from passdeploy.export.torch_trt_report import Census, describe, partition_report, require_precision
from passdeploy.runtime import cuda_driver
from passdeploy.runtime.cuda_driver import Driver

from .nets import SmallNet, small_net


def test_options_become_the_compilers_keywords():
    options = EngineOptions(workspace_bytes=7, refittable=True, timing_cache=Path("cache"), tf32=False)
    settings = compile_settings(options, "tensorrt")
    assert (settings["immutable_weights"], settings["disable_tf32"]) == (False, True)
    assert (settings["workspace_size"], settings["timing_cache_path"]) == (7, "cache")
    assert not [name for name in settings if "autocast" in name or "precision" in name]  # the graph has the types
    with pytest.raises(UsageError, match="--weight-stripped is for engines"):
        compile_settings(EngineOptions(weight_stripped=True), "tensorrt")
    with pytest.raises(UsageError, match="builds without a GPU, and so without --refittable, --timing-cache"):
        compile_settings(options, "rtx")


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
    assert report["torch_lines"] == ["neg", "cumsum"]
    assert report == {
        "engines": 2,
        "torch_parts": 1,
        "torch_operations": 4,
        "switches": 2,
        "torch_operators": {"cumsum": 3, "neg": 1},
        "torch_lines": ["neg", "cumsum"],
    }
    assert describe(report) == "2 engines, 4 operations stay in PyTorch (2 switches): neg, cumsum"


@pytest.mark.parametrize(
    ("products", "weights", "sizes", "words"),
    [
        ({"fp32": 3}, {"fp32": 100}, [9], r"asked fp16, found 0 of 3 products in it \(3 fp32\)"),
        ({"fp16": 3}, {"fp16": 10, "fp32": 100}, [9], "but most of the weights are not"),
        ({"fp16": 3}, {"fp16": 10 << 20}, [8 << 20, 12 << 20], r"weights take 10\.5 MB; the engines take 21\.0 MB"),
    ],
)
def test_a_program_in_another_precision_is_refused(
    products: dict[str, int], weights: dict[str, int], sizes: list[int], words: str
):
    census = Census()
    census.products.update(products)
    census.weights.update(weights)
    with pytest.raises(ExportError, match=words):
        require_precision(census, "fp16", sizes, "rtx", has_kept=False)


@pytest.mark.parametrize(
    ("layers", "weights", "size"),
    # as built: EfficientNet-B0 with half of its MACs, ShuffleNetV2 1.0x, SqueezeNet 1.0, Swin-T, a tiny ConvNeXt
    [
        (240, 5_800_000, 10_500_000),
        (190, 4_500_000, 7_300_000),
        (68, 2_496_848, 3_131_612),
        (451, 57_634_524, 73_161_260),
        (20, 40_000, 2_100_000),
    ],
)
def test_code_of_many_layers_is_not_taken_for_weights(layers: int, weights: int, size: int):
    census = Census()
    census.layers.update({"fp16": layers})
    census.products.update({"fp16": 3})
    census.weights.update({"fp16": weights})
    require_precision(census, "fp16", [size], "rtx", has_kept=False)


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

    def save(self, compiled: nn.Module, path: str, **_: Any) -> None:
        if self.wrong:
            with torch.no_grad():
                next(iter(self.program.state_dict.values())).mul_(2)
        torch.export.save(self.program, path)

    def load(self, path: str) -> torch.export.ExportedProgram:
        return torch.export.load(path)


class TestOnAGpuThatIsTheCpu:
    @pytest.fixture(autouse=True)
    def cuda_is_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_driver, "probe_driver", lambda: Driver((13, 2), ("Imaginary GPU",)))
        installed = {"torch": "2.14.0", "torch-tensorrt": "2.14.0"}
        monkeypatch.setattr(torch_trt_release, "package_versions", lambda: installed)
        monkeypatch.setattr(torch_trt, "has_gpu_of_torch", lambda: True)
        make_zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **options: make_zeros(*shape, **options))
        monkeypatch.setattr(torch_trt, "ModuleSession", lambda module, _: self.session(module, "cpu"))

    session = torch_trt.ModuleSession

    def imported(self, monkeypatch: pytest.MonkeyPatch, stand_in: StandIn) -> StandIn:
        observer = SimpleNamespace(add=lambda callback: nullcontext())
        interpreter = SimpleNamespace(TRT_INTERPRETER_CALL_PRE_OBSERVER=observer)
        monkeypatch.setattr(torch_trt_release, "import_module", lambda name: stand_in)
        monkeypatch.setattr(torch_trt, "import_module", lambda name: interpreter)
        return stand_in

    def test_a_program_is_saved_compared_and_described(
        self, net: SmallNet, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        stand_in = self.imported(monkeypatch, StandIn())
        path = tmp_path / "model-fp16.pt2"
        reference = compute_reference(net, images, batch_sizes=(1, 2, 4))
        artifact = compile_program(net, reference, path, precision="fp16", batch=(1, 2, 4), limits=LIMITS["fp16"])
        assert stand_in.input.max_shape == (4, 3, 16, 16)
        assert artifact.facts["parity"]["batch_sizes"] == [1, 2, 4]
        assert artifact.facts["torch_operations"] > 0  # the stand-in left everything in PyTorch
        loaded = torch.export.load(path).module()
        torch.testing.assert_close(loaded(images[:3]), net(images[:3]), rtol=0.05, atol=0.02)

    def test_a_program_that_was_saved_as_something_else_is_set_aside(
        self, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        self.imported(monkeypatch, StandIn(wrong=True))
        net = small_net()
        reference = compute_reference(net, images, batch_sizes=(1, 2, 4))
        with pytest.raises(ParityError, match="do not deploy it"):
            compile_program(net, reference, tmp_path / "model.pt2", batch=(1, 2, 4), limits=LIMITS["fp32"])
        assert [path.name for path in tmp_path.iterdir()] == ["model.pt2.rejected"]

    @pytest.mark.parametrize("has_onnxruntime", [True, False])
    def test_programs_are_compared_by_accuracy_with_answers_that_are_computed_once(
        self,
        has_onnxruntime: bool,
        net: SmallNet,
        images: Tensor,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        self.imported(monkeypatch, StandIn())
        computed: list[int] = []

        def compute(*arguments: Any, **options: Any) -> Reference:
            computed.append(len(arguments[1]))
            return compute_reference(*arguments, **options)

        monkeypatch.setattr(exporter, "compute_reference", compute)
        if not has_onnxruntime:
            monkeypatch.setattr(exporter, "find_spec", lambda name: None)
        labels = net(images).argmax(1)
        labels[0] = (labels[0] + 1) % 5
        samples = Samples(images, images, (3, 16, 16), (0.0,) * 3, (1.0,) * 3, labels)
        settings = ExportSettings(kinds=("onnx", "torch-trt"), precisions=("fp32", "fp16"), batch=(1, 2, 4))
        *_, whole, half = export_artifacts(net, samples, tmp_path, settings)
        assert [one.path for one in (whole, half)] == [tmp_path / "model.pt2", tmp_path / "model-fp16.pt2"]
        for parity in (whole.facts["parity"], half.facts["parity"]):
            assert (parity["top1"], parity["reference_top1"], parity["real_images"]) == (0.8, 0.8, 5)
        assert computed == [5]

    def test_noise_is_not_counted_as_real_images(self, net: SmallNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.imported(monkeypatch, StandIn())
        no_samples = Samples.empty((3, 16, 16), (0.0,) * 3, (1.0,) * 3)
        settings = ExportSettings(kinds=("onnx", "torch-trt"), batch=(1, 2, 4))
        *_, program = export_artifacts(net, no_samples, tmp_path, settings)
        assert program.facts["parity"]["real_images"] == 0

    def test_a_program_that_fails_leaves_the_one_that_passed_before(
        self, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        samples = Samples(images, images, (3, 16, 16), (0.0,) * 3, (1.0,) * 3)
        settings = ExportSettings(kinds=("onnx", "torch-trt"), batch=(1, 2, 4))
        (tmp_path / "model.pt2").write_bytes(b"of before")
        replaced: list[Path] = []

        def export() -> None:
            list(export_artifacts(small_net(), samples, tmp_path, settings, replacing=replaced.append))

        self.imported(monkeypatch, StandIn(wrong=True))
        with pytest.raises(ParityError, match=r"model\.pt2 differs"):
            export()
        assert replaced == [tmp_path / "model.onnx"]
        assert (tmp_path / "model.pt2").read_bytes() == b"of before"
        assert (tmp_path / "model.pt2.rejected").is_file()
        self.imported(monkeypatch, StandIn())
        export()
        assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.pt2"}

    def test_a_preview_has_answers_for_a_fixed_batch_too(
        self, net: SmallNet, images: Tensor, monkeypatch: pytest.MonkeyPatch
    ):
        self.imported(monkeypatch, StandIn())
        reference = compute_reference(net, images, batch_sizes=(1, 2, 4))
        facts = preview_program(net, reference, precision="fp16", batch=(1, 2, 4), limits=LIMITS["fp16"])
        assert facts["engines_with_fixed_batch"] == 0  # the stand-in leaves everything in PyTorch
