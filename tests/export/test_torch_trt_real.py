"""Programs compiled with the real Torch-TensorRT for RTX, without a GPU: `make test-torch-trt`.

What is answered for the GPU is in tests/torch_trt_without_gpu.py. Everything else is real up to the saved `.pt2`, which
is not run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from click.testing import CliRunner
from torch import Tensor, nn

from passdeploy import Plan, find_groups, slim
from passdeploy.cli import main
from passdeploy.errors import ExportError, MissingError
from passdeploy.export import BatchRange, EngineOptions, torch_trt_network
from passdeploy.export.precision import LIMITS
from passdeploy.export.reference import Reference, compute_reference
from passdeploy.export.torch_trt import compile_program, preview_program
from passdeploy.export.torch_trt_lowering import LoweredGraph
from passdeploy.export.torch_trt_program import read_label
from passdeploy.export.torch_trt_release import load_torch_trt
from passdeploy.models.build import build_model
from passdeploy.profiling.candidates import open_program
from passdeploy.profiling.program_file import has_tensorrt
from passdeploy.runtime import cuda_driver
from passdeploy.runtime.cuda_driver import Driver

from ..nets import randomise_
from .nets import small_net

pytestmark = [
    pytest.mark.torch_trt,
    pytest.mark.skipif(find_spec("torch_tensorrt") is None, reason="needs Torch-TensorRT: make test-torch-trt"),
]


@pytest.fixture(autouse=True)
def gpu_is_answered_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from ..torch_trt_without_gpu import GPU, import_without_gpu

    monkeypatch.setattr(cuda_driver, "probe_driver", lambda: Driver((13, 2), (GPU.name,)))
    import_without_gpu()


def made(network: nn.Module) -> nn.Module:
    """Return a network in eval mode with weights that differ everywhere, so that its outputs do."""
    return randomise_(network).eval()


def halved(network: nn.Module, size: int) -> nn.Module:
    """Slim a network to half of the channels of every group."""
    images = torch.randn(2, 3, size, size)
    groups = find_groups(network, images)
    kept = {group.name: tuple(range(0, group.width, 2)) for group in groups if group.is_prunable}
    assert kept
    return slim(network, groups, Plan(kept=kept)).eval()


def torchvision_model(name: str, **options: Any) -> nn.Module:
    return made(getattr(torchvision.models, name)(weights=None, num_classes=10, **options))


def vit() -> nn.Module:
    return made(torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10))


def swin() -> nn.Module:
    return made(torchvision.models.SwinTransformer([2, 2], 16, [1, 1], [2, 2], [4, 4], num_classes=10))


def convnext() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    return made(torchvision.models.ConvNeXt([block(16, 32, 1), block(32, None, 1)], num_classes=10))


def densenet() -> nn.Module:
    return made(torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10))


class Replaced(nn.Module):
    """Operators that are replaced before Torch-TensorRT sees them; no network above has all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.convolution(images)
        x = F.fold(F.unfold(x, 3, stride=2, padding=1), (16, 16), 3, stride=2, padding=1)
        x = F.rms_norm(x, (16,)) + x.var(1, keepdim=True)
        x = F.max_pool2d(x, 3, 2, ceil_mode=True) + F.avg_pool2d(x, 3, 2, ceil_mode=True)
        return F.hardswish(x).mean((2, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {  # name -> network, image size, precision
    "MobileNetV2": (lambda: torchvision_model("mobilenet_v2"), 32, "fp16"),
    "MobileNetV3": (lambda: torchvision_model("mobilenet_v3_small"), 32, "fp32"),
    "ResNet-18": (lambda: torchvision_model("resnet18"), 32, "bf16"),
    "SqueezeNet": (lambda: torchvision_model("squeezenet1_0"), 35, "fp16"),  # pools with ceil_mode
    "ShuffleNetV2": (lambda: torchvision_model("shufflenet_v2_x0_5"), 32, "fp16"),
    "RegNet": (lambda: torchvision_model("regnet_y_400mf"), 32, "fp16"),
    "DenseNet": (densenet, 32, "fp32"),
    "ConvNeXt": (convnext, 32, "fp16"),
    "ConvNeXt, fp32": (convnext, 32, "fp32"),
    "ViT": (vit, 32, "fp16"),
    "Swin": (swin, 32, "bf16"),
    "replaced operators": (lambda: Replaced().eval(), 16, "fp16"),
    "ResNet-20": (lambda: made(build_model("passdeploy/resnet20_cifar", num_classes=10)), 32, "fp16"),
    "ResNet-20, slim": (lambda: halved(made(build_model("passdeploy/resnet20_cifar", num_classes=10)), 32), 32, "fp16"),
    "MobileNetV2, slim": (lambda: halved(torchvision_model("mobilenet_v2"), 32), 32, "fp32"),
    "ViT, slim": (lambda: halved(vit(), 32), 32, "fp16"),
}


def answers(network: nn.Module, images: Tensor, batch: tuple[int, ...] = (1, 8, 32)) -> Reference:
    """Compute what a network answers at the sizes at which a program is compared."""
    return compute_reference(network, images, batch_sizes=BatchRange.of(batch).parity_sizes)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_becomes_one_engine_for_any_batch(name: str, tmp_path: Path):
    make, size, precision = NETWORKS[name]
    network, path = make(), tmp_path / "model-rtx.pt2"
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    reference = answers(network, images, (1, 4, 8))
    program = compile_program(network, reference, path, precision=precision, batch=(1, 4, 8), limits=LIMITS[precision])
    facts = program.facts
    assert (facts["flavour"], facts["engines"], facts["torch_operations"]) == ("rtx", 1, 0)
    assert facts["lowered_difference"] <= 1e-5
    assert facts["kept"] == facts["beyond_range"] == []
    assert set(facts["census"]["products"]) == {precision}
    (size_bytes,) = facts["engine_bytes"]
    assert size_bytes > sum(facts["census"]["weights"].values()) * 0.9
    assert "parity" not in facts  # nothing was run, and nothing is said of it
    assert_saved(path, program.facts, precision, size_bytes)


def assert_saved(path: Path, facts: Any, precision: str, engine_bytes: int) -> None:
    """Check what is in a program's file: its graph, open batch, engine and label."""
    assert has_tensorrt(path)
    with zipfile.ZipFile(path) as archive:
        names = {name.split("/", 1)[1]: name for name in archive.namelist()}
        graph = json.loads(archive.read(names["models/model.json"]))
        assert archive.getinfo(names["data/constants/opaque_obj_0"]).file_size > engine_bytes
    nodes = graph["graph_module"]["graph"]["nodes"]
    assert nodes[0]["target"] == "torch.ops.tensorrt.execute_engine.default"
    # PyTorch writes 2 for a smallest size of 1.
    assert [(limits["min_val"], limits["max_val"]) for limits in graph["range_constraints"].values()] == [(2, 8)]
    label = read_label(path)
    assert (label["precision"], label["flavour"], label["versions"]) == (precision, "rtx", facts["versions"])


def test_fp16_and_bf16_engines_are_half_as_large(tmp_path: Path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 1024), nn.ReLU(), nn.Linear(1024, 10)).eval()
    reference = answers(network, torch.randn(2, 3, 16, 16), (2, 2, 2))
    weights, engines = {}, {}
    for precision in ("fp32", "fp16", "bf16"):
        path = tmp_path / f"{precision}.pt2"
        facts = compile_program(
            network, reference, path, precision=precision, batch=(2, 2, 2), limits=LIMITS[precision]
        ).facts
        weights[precision] = facts["census"]["weights"][precision]
        (engines[precision],) = facts["engine_bytes"]
    assert weights["fp32"] == 2 * weights["fp16"] == 2 * weights["bf16"]
    assert engines["fp16"] < 0.6 * engines["fp32"]
    assert engines["bf16"] == pytest.approx(engines["fp16"], rel=0.05)


def test_a_program_whose_weights_are_not_in_the_precision_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_trt_network, "CastGraph", lambda graph, precision, keep: Uncast(graph))
    monkeypatch.setattr(torch_trt_network, "_layers_to_keep", lambda *_: ())
    network = small_net()
    reference = answers(network, torch.randn(2, 3, 16, 16))
    with pytest.raises(ExportError, match=r"asked fp16, found 0 of \d+ products in it \(\d+ fp32\)"):
        compile_program(network, reference, tmp_path / "x.pt2", precision="fp16", limits=LIMITS["fp16"])
    assert list(tmp_path.iterdir()) == []


class Uncast(LoweredGraph):
    kept: frozenset[str] = frozenset()


class Split(nn.Module):
    """Two convolutions with an operator between them that TensorRT does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.second(torch.special.digamma(self.first(images).abs() + 1)).mean((2, 3))


def test_what_stays_in_pytorch_is_named_with_its_line_by_a_dry_run_and_by_the_build(tmp_path: Path):
    network = Split().eval()
    reference = answers(network, torch.randn(2, 3, 16, 16))
    preview = preview_program(network, reference, precision="fp16", limits=LIMITS["fp16"])
    built = compile_program(network, reference, tmp_path / "x.pt2", precision="fp16", limits=LIMITS["fp16"])
    line = Split.forward.__code__.co_firstlineno + 1
    assert preview["torch_lines"] == [f"digamma test_torch_trt_real.py:{line}"]
    assert (preview["engines"], preview["torch_parts"], preview["switches"]) == (2, 1, 2)
    assert preview["engines_with_fixed_batch"] == 2  # a fixed batch does not help here
    assert preview["coverage"] == pytest.approx(1 - 1 / preview["operators"], abs=1e-4)
    assert {key: built.facts[key] for key in ("engines", "torch_lines", "switches")} == {
        key: preview[key] for key in ("engines", "torch_lines", "switches")
    }
    assert len(built.facts["engine_bytes"]) == 2


def test_a_network_with_few_operators_becomes_an_engine_too(tmp_path: Path):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    reference = answers(network, torch.randn(1, 3, 8, 8), (1, 1, 1))
    program = compile_program(network, reference, tmp_path / "x.pt2", batch=(1, 1, 1), limits=LIMITS["fp32"])
    assert (program.facts["engines"], program.facts["torch_operations"]) == (1, 0)


def test_layers_that_overflow_stay_float32(tmp_path: Path):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        network[1].weight.mul_(3e5)  # its outputs are beyond 65504, its weights are not
        network[2].weight.div_(1e5)
    reference = answers(network, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    program = compile_program(network, reference, tmp_path / "x.pt2", precision="fp16", limits=LIMITS["fp16"])
    assert program.facts["kept"] == ["conv2d_1", "conv2d_2"]  # the second would read what overflows
    assert program.facts["kept_modules"] == ["1", "2"]
    assert program.facts["census"]["products"] == {"fp16": 2, "fp32": 2}


def test_options_reach_the_builder_or_are_refused(tmp_path: Path):
    network = small_net()
    reference = answers(network, torch.randn(2, 3, 16, 16))
    options = EngineOptions(workspace_bytes=64 << 20, optimization_level=1, tf32=False)
    program = compile_program(network, reference, tmp_path / "x.pt2", options=options, limits=LIMITS["fp32"])
    assert program.facts["engines"] == 1
    with pytest.raises(Exception, match="--refittable"):
        compile_program(
            network, reference, tmp_path / "y.pt2", options=EngineOptions(refittable=True), limits=LIMITS["fp32"]
        )


class TestCommands:
    @pytest.fixture(autouse=True)
    def in_a_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def export(self, *options: str) -> Any:
        model = ("--model", "passdeploy/resnet20_cifar", "--classes", "10", "--image-size", "16", "--out", "out")
        return CliRunner().invoke(main, ["export", *model, "--quiet", *options])

    def test_a_dry_run_says_what_it_would_make_and_writes_nothing(self, tmp_path: Path):
        result = self.export("--torch-trt", "--dry-run", "--precision", "fp32,fp16")
        assert result.exit_code == 0, result.output
        said = " ".join(result.output.split())  # lines end at the width of the terminal
        assert "passdeploy/resnet20_cifar fp16: 1 engine, " in said
        assert "100.0 % of them in engines; convolutions and products: 20 fp16" in said
        assert list(tmp_path.iterdir()) == []

    def test_programs_are_named_after_the_flavour_and_another_is_refused(self, tmp_path: Path):
        result = self.export("--torch-trt", "--precision", "fp16")
        assert result.exit_code == 0, result.output
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model-fp16-rtx.pt2", "model-fp16.onnx"]
        refused = self.export("--torch-trt", "--flavour", "tensorrt")
        assert refused.exit_code == 3
        said = " ".join(refused.output.split())
        assert "asked was Torch-TensorRT, installed is Torch-TensorRT for RTX 2.14.0" in said

    def test_int8_is_refused_with_what_to_use(self):
        refused = self.export("--torch-trt", "--precision", "int8", "--images", "out")
        assert refused.exit_code == 2
        assert "not int8" in refused.output
        assert "Use --trt, which builds int8 engines" in refused.output


def test_a_program_of_the_other_flavour_is_refused(tmp_path: Path):
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        label = {"flavour": "tensorrt", "versions": {"torch-tensorrt": "2.14.0"}}
        archive.writestr("model/extra/passdeploy.json", json.dumps(label))
    with pytest.raises(
        MissingError, match=r"with Torch-TensorRT 2\.14\.0; installed is Torch-TensorRT for RTX 2\.14\.0"
    ):
        open_program(path, "torch-trt", "cuda")


HALF = """
import sys
sys.modules["{hidden}"] = None
from passdeploy.errors import MissingError
from passdeploy.export.torch_trt_release import load_torch_trt
from passdeploy.runtime import cuda_driver
cuda_driver.probe_driver = lambda: cuda_driver.Driver((13, 2), ("Imaginary GPU",))
try:
    load_torch_trt()
except MissingError as error:
    print(error)
"""


@pytest.mark.parametrize("hidden", ["tensorrt_rtx_libs", "tensorrt_rtx_bindings"])
def test_half_of_tensorrt_is_one_clear_error(hidden: str):
    process = subprocess.run([sys.executable, "-c", HALF.format(hidden=hidden)], capture_output=True, text=True)
    first, *advice = process.stdout.splitlines()
    assert first.startswith("Torch-TensorRT for RTX does not load: ")
    assert "torch-tensorrt-rtx 2.14.0" in advice[0]
    assert advice[1] == "In an environment of its own: pip install 'passdeploy[torch-trt-rtx]'"
    assert len(advice) == 2


def test_the_flavour_that_is_installed_is_found():
    assert load_torch_trt()[1] == "rtx"
