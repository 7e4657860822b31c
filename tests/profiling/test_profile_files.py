from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from passdeploy.errors import CorruptArtifact, MissingError, RunError, UsageError
from passdeploy.export.artifact import describe_artifact
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.export.trt_sidecar import write_sidecar
from passdeploy.profiling import Candidate, Setting
from passdeploy.profiling import profile_files as profile_module
from passdeploy.profiling.candidates import make_runner
from passdeploy.profiling.file_batches import batches_that_run
from passdeploy.profiling.file_inputs import InputTensor, _values_of, read_file_inputs
from passdeploy.profiling.profile_files import profile_files
from passdeploy.runtime import cuda_driver
from passdeploy.runtime.events import Warned
from passdeploy.runtime.onnx_examiner import OnnxExaminer
from tests.command_line import call_command

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


def test_a_file_of_others_is_tried_with_the_gpus_provider_first(files: Path, monkeypatch: pytest.MonkeyPatch):
    tried: list[tuple[str, str]] = []

    class Examiner(OnnxExaminer):
        def open(self, path: Path) -> None:
            tried.append((self._provider, path.name))

    monkeypatch.setattr(profile_module, "OnnxExaminer", Examiner)
    monkeypatch.setattr(profile_module, "_backend_of", lambda *_: 1 / 0)  # here this process would begin with the file
    path = files / "small.onnx"
    for backend, trusted in (("ort-trt", ()), ("ort", ()), ("ort-trt", (path,))):
        with pytest.raises(ZeroDivisionError):
            profile_files([path], backend=backend, trusted=trusted)
    cpu, tensorrt = "CPUExecutionProvider", "TensorrtExecutionProvider"
    assert tried == [(cpu, path.name), (tensorrt, path.name), (cpu, path.name)]


NODE, FLOAT, INT64 = helper.make_node, TensorProto.FLOAT, TensorProto.INT64


def onnx_file(folder: Path, inputs: list[tuple[str, int, list[int | str]]], nodes: list[onnx.NodeProto]) -> Path:
    """Write a graph whose output is called `out`."""
    tensors = [helper.make_tensor_value_info(*each) for each in inputs]
    is_cast = nodes[-1].op_type == "Cast"
    kind = FLOAT if is_cast else inputs[0][1] if inputs else INT64
    out = helper.make_tensor_value_info("out", kind, None)
    shape = numpy_helper.from_array(np.array([1, 12], np.int64), "baked")
    graph = helper.make_graph(nodes, "g", tensors, [out], [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, folder / "made.onnx")
    return folder / "made.onnx"


@pytest.mark.parametrize(
    ("inputs", "nodes", "batches"),
    [
        ([("x", TensorProto.FLOAT16, ["N", 3, 4, 4])], [NODE("Relu", ["x"], ["out"])], [1, 8]),
        ([("x", TensorProto.UINT8, ["N", 4, 4, 3])], [NODE("Cast", ["x"], ["out"], to=FLOAT)], [1, 8]),
        ([("x", TensorProto.DOUBLE, [2, 3, 4, 4])], [NODE("Cast", ["x"], ["out"], to=FLOAT)], [2]),
        ([("x", FLOAT, [3, 4, 4])], [NODE("Relu", ["x"], ["out"])], [1]),
        ([("ids", INT64, ["N", 16])], [NODE("Abs", ["ids"], ["out"])], [1, 8]),
        ([("mask", TensorProto.BOOL, ["N", 16])], [NODE("Not", ["mask"], ["out"])], [1, 8]),
        ([("x", FLOAT, ["N", 3, 4, 4]), ("least", FLOAT, [1])], [NODE("Add", ["x", "least"], ["out"])], [1, 8]),
        ([("x", FLOAT, ["N", 3, 2, 2])], [NODE("Reshape", ["x", "baked"], ["out"])], [1]),
    ],
    ids=["half", "pixels", "double and fixed", "no batch", "tokens", "truth values", "two inputs", "baked batch"],
)
def test_every_input_is_read_and_given_what_it_takes(
    tmp_path: Path, inputs: list[tuple[str, int, list[int | str]]], nodes: list[onnx.NodeProto], batches: list[int]
):
    told = list[object]()
    file = onnx_file(tmp_path, inputs, nodes)
    read = read_file_inputs(file).with_sizes(None, {})
    candidate = Candidate("made.onnx", onnx=file, inputs=read.values)
    runs = batches_that_run(
        candidate,
        read.possible_batches(None),
        lambda each: make_runner(each, "ort", 1, Setting()),
        is_strict=False,
        listener=told.append,
    )
    assert runs == batches
    fails = [event for event in told if isinstance(event, Warned) and "fails with a batch of 8" in event.text]
    assert len(fails) == (inputs[0][2] == ["N", 3, 2, 2])


RELU = [NODE("Relu", ["x"], ["out"])]


@pytest.mark.parametrize(
    ("inputs", "nodes", "options", "words"),
    [
        ([("x", FLOAT, ["N", 3, "H", "W"])], RELU, {}, r"3 x H x W, of any size\.\nSay which: --image-size 224"),
        ([("x", FLOAT, ["N", "L", 8])], RELU, {}, r"x \(float32, N x L x 8\).*\n.*--shape x=1x128x8"),
        ([("x", FLOAT, ["N", "L", 8])], RELU, {"shapes": {"x": [1, 4, 9]}}, "asked was --shape x=1x4x9"),
        ([("x", FLOAT, ["N", "L", 8])], RELU, {"shapes": {"y": [1]}}, "has no input 'y'"),
        ([("x", TensorProto.STRING, ["N"])], [NODE("Identity", ["x"], ["out"])], {}, "tensor\\(string\\)"),
        ([], [NODE("Identity", ["baked"], ["out"])], {}, "takes no input"),
        ([("x", FLOAT, [3, 4, 4])], RELU, {"batches": [2]}, "without a batch"),
        (
            [("x", FLOAT, ["N", 3, 2, 2])],
            [NODE("Reshape", ["x", "baked"], ["out"])],
            {"batches": [8]},
            "fails with a batch of 8: .*\nIt runs with --batch 1, though it declares any",
        ),
    ],
)
def test_a_file_that_cannot_be_measured_as_it_is_says_what_to_give(
    tmp_path: Path,
    inputs: list[tuple[str, int, list[int | str]]],
    nodes: list[onnx.NodeProto],
    options: dict[str, object],
    words: str,
):
    with pytest.raises(UsageError, match=words) as caught:
        profile_files([onnx_file(tmp_path, inputs, nodes)], threads=1, seconds=0.1, **options)  # type: ignore[arg-type]
    assert str(caught.value).count("\n") <= 2


def test_sizes_that_are_open_can_be_given(tmp_path: Path):
    file = onnx_file(tmp_path, [("x", FLOAT, ["N", "L", 8])], RELU)
    (row,) = profile_files([file], threads=1, seconds=0.1, shapes={"x": [3, 5, 8]}).rows
    assert row.batch == 3
    images = onnx_file(tmp_path, [("x", FLOAT, ["N", 3, "H", "W"])], RELU)
    assert read_file_inputs(images).with_sizes(16, {}).sample_shape() == (3, 16, 16)
    assert call_command("profile", images, "--shape", "x").exit_code == 2


def test_a_file_with_two_inputs_is_measured_from_the_command_line(tmp_path: Path):
    inputs = [("x", FLOAT, [1, 3, 4, 4]), ("least", FLOAT, ["K"])]
    file = onnx_file(tmp_path, inputs, [NODE("Add", ["x", "least"], ["out"])])
    said = call_command("profile", file, "--threads", "1", "--seconds", "0.1", "--json")
    assert said.exit_code == 0, said.stderr
    assert [row["batch"] for row in json.loads(said.stdout)["rows"]] == [1]


def test_a_program_gets_all_its_inputs_in_their_types(tmp_path: Path):
    class Sum(nn.Module):
        def forward(self, images: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
            return images.float().mean((1, 2, 3)) + least

    inputs = (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2))
    torch.export.save(torch.export.export(Sum(), inputs), tmp_path / "sum.pt2")
    (row,) = profile_files([tmp_path / "sum.pt2"], threads=1, seconds=0.1).rows
    assert row.batch == 2


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.int64])
def test_an_input_may_be_a_single_number(dtype: torch.dtype):
    value = _values_of(InputTensor("threshold", dtype, ()), 4)
    assert (value.shape, value.dtype) == ((), dtype)
