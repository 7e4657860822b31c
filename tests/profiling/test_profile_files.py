from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from passdeploy.errors import CorruptArtifact, MissingError, RunError, UsageError
from passdeploy.export.artifact import describe_artifact
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.export.trt_sidecar import write_sidecar
from passdeploy.profiling import Setting
from passdeploy.profiling.profile_files import profile_files
from passdeploy.runtime import cuda_driver

pytest.importorskip("onnxruntime", reason="extra cpu is not installed")


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, size in (("small", 16), ("large", 24)):
        export_onnx(network(), torch.zeros(1, 3, size, size), folder / f"{name}.onnx", batch=(1, 2, 4))
    export_onnx(network(8), torch.zeros(1, 3, 16, 16), folder / "fixed.onnx", batch=(2, 2, 2))
    torch.export.save(torch.export.export(network(), (torch.zeros(2, 3, 16, 16),)), folder / "program.pt2")
    (folder / "broken.pt2").write_bytes(b"no archive")
    for name in ("plan", "foreign"):
        (folder / f"{name}.engine").write_bytes(b"a plan")
    write_sidecar(describe_artifact(folder / "plan.engine", kind="engine", precision="fp32", facts={}))
    with zipfile.ZipFile(folder / "accelerated.pt2", "w") as archive:
        archive.writestr("accelerated/models/model.json", '{"target": "torch.ops.tensorrt.execute_engine.default"}')
    return folder


def test_one_file_is_measured_by_itself(files: Path):
    (row,) = profile_files([files / "small.onnx"], batches=[2], threads=1, seconds=0.1).rows
    assert (row.model, row.backend, row.batch, row.speedup) == (str(files / "small.onnx"), "ort", 2, 1.0)
    assert row.median_ms > 0
    assert row.n >= 8


def test_two_files_are_measured_in_turns(files: Path):
    rows = profile_files([files / "small.onnx", files / "fixed.onnx"], batches=[2], threads=1, seconds=0.1).rows
    assert [row.artifact for row in rows] == ["small.onnx", "fixed.onnx"]
    low, high = rows[1].speedup_ci
    assert low <= rows[1].speedup <= high


def test_a_program_of_pytorch_is_run_by_pytorch(files: Path):
    (row,) = profile_files([files / "program.pt2"], batches=[2], threads=1, seconds=0.1).rows
    assert (row.backend, row.artifact) == ("torch", "program.pt2")


@pytest.mark.parametrize(
    ("names", "options", "error", "words"),
    [
        (["small.onnx", "large.onnx"], {}, UsageError, "takes images of 3 x 16 x 16, .* of 3 x 24 x 24"),
        (["small.onnx"], {"batches": [8]}, UsageError, "was made for batches of 1 to 4; asked was 8"),
        (["fixed.onnx"], {"batches": [1]}, UsageError, "was made for batches of 2; asked was 1"),
        (["program.pt2"], {"batches": [1]}, UsageError, "was made for batches of 2; asked was 1"),
        (["small.onnx"], {"image_size": 32}, UsageError, "takes images of 3 x 16 x 16; asked was --image-size 32"),
        (["small.onnx", "program.pt2"], {}, UsageError, "two different backends"),
        (["small.onnx"] * 3, {}, UsageError, "give one, or two"),
        (["none.onnx"], {}, RunError, "there is no file"),
        (["broken.pt2"], {}, CorruptArtifact, "cannot open broken.pt2"),
        (["plan.engine"], {}, MissingError, "no NVIDIA driver here, and running an engine needs the target GPU"),
        (["foreign.engine"], {}, CorruptArtifact, "has no sidecar"),
        (["accelerated.pt2"], {}, MissingError, "no NVIDIA driver here, and a Torch-TensorRT program"),
        (["small.onnx"], {"backend": "torch"}, UsageError, "small.onnx runs in ort, not in torch"),
        (["small.onnx"], {"backend": "ort-cuda"}, MissingError, "has no CUDAExecutionProvider"),
        (["small.onnx"], {"setting": Setting(precision="fp16")}, UsageError, "leave out --precision"),
        (["small.onnx"], {"setting": Setting(cuda_graph=True)}, UsageError, "not for ort"),
        (["program.pt2"], {"setting": Setting(channels_last=True)}, UsageError, "leave out --channels-last"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    names: list[str],
    options: dict[str, object],
    error: type[Exception],
    words: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(cuda_driver, "probe_driver", lambda: None)
    with pytest.raises(error, match=words) as caught:
        profile_files([files / name for name in names], **{"batches": [2], "seconds": 0.1, **options})  # type: ignore[arg-type]
    assert str(caught.value).count("\n") <= 2
