"""Tests of `passdeploy export` on the command line: without a run, to bundles and to Triton, and its refusals."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
import safetensors.torch

from passdeploy.commands import prune
from passdeploy.commands.export_run import _remove_drafts, export_run
from passdeploy.export import ExportSettings
from passdeploy.models.build import build_model
from passdeploy.runs.folder import RunFolder
from passdeploy.runtime import cuda_driver
from tests.command_line import call_command
from tests.conftest import write_image_folder

MODEL = "passdeploy/resnet8_cifar"


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    return partial(call_command, "export")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    safetensors.torch.save_file(build_model(MODEL, num_classes=3).state_dict(), path)
    return path


def test_a_model_is_exported_without_a_run(call, weights: Path, tmp_path: Path):
    options = ("--onnx", "--image-size", 16, "--batch", "1,2,4", "--opset", 19, "--triton", "--bundle", "--json")
    result = call("--model", MODEL, "--weights", weights, *options)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    graph, *packaged = document["artifacts"]
    assert graph["path"] == "exports/resnet8_cifar/model.onnx"
    assert graph["facts"]["opset"] == 19
    model = onnx.load(tmp_path / graph["path"])
    assert model.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 3  # as many as the weights are for
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert "w.safetensors" in json.loads(metadata["sha256"])
    assert {artifact["kind"] for artifact in packaged} == {"triton", "bundle"}
    assert (tmp_path / "exports/resnet8_cifar/triton/resnet8_cifar/config.pbtxt").is_file()
    assert (tmp_path / "exports/resnet8_cifar/bundle/build.sh").is_file()


@pytest.mark.rtx
@pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="extra rtx is not installed")
def test_a_bundle_is_written_built_and_its_engine_checked(
    call, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    images = write_image_folder(tmp_path / "images", classes=3)
    options = ("--trt", "--flavour", "rtx", "--batch", "1,2,4", "--bundle", tmp_path / "b")
    bundled = call("--model", MODEL, "--weights", weights, "--image-size", 16, "--images", images, *options)
    assert bundled.exit_code == 0, bundled.output
    assert "sh build.sh" in bundled.stderr
    assert not list(tmp_path.rglob("*.engine"))  # engines are built on the target
    (command,) = [line for line in (tmp_path / "b/build.sh").read_text().splitlines() if not line.startswith("#")]
    program, verb, *options = shlex.split(command)
    assert (program, verb) == ("passdeploy", "export")
    monkeypatch.chdir(tmp_path / "b")  # build.sh is run in its own folder
    built = call(*options, "--json")
    assert built.exit_code == 0, built.output
    (engine,) = json.loads(built.stdout)["artifacts"]
    assert engine["facts"]["batch"] == [1, 2, 4]

    monkeypatch.setattr(cuda_driver, "probe_driver", lambda: None)
    checked = call("--check-engine", engine["path"])
    assert (checked.exit_code, "no NVIDIA driver" in checked.stderr) == (3, True)
    Path(engine["path"]).write_bytes(b"something else")
    assert call("--check-engine", engine["path"]).exit_code == 5


def test_a_failed_gate_exits_with_4_and_leaves_the_file_as_rejected(
    call, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from passdeploy.export import settings

    strict = {**settings.LIMITS, "fp32": replace(settings.LIMITS["fp32"], rel_error=0.0)}
    monkeypatch.setattr(settings, "LIMITS", strict)
    monkeypatch.setattr(settings.ExportSettings, "limits", lambda self, precision: strict[precision])
    result = call("--model", MODEL, "--weights", weights, "--image-size", 16, "--batch", "1,2,4", "--out", "out")
    assert result.exit_code == 4, result.output
    assert "do not deploy it" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx.rejected"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--trt"], 3, "--bundle"),
        (["--torch-trt"], 3, "GPU"),
        (["--precision", "int4"], 2, "choose from fp32, fp16, bf16, int8, fp8"),
        (["--precision", "int8"], 2, "--images"),
        (["--precision", "bf16", "--opset", "20"], 2, "--opset 22"),
        (["--opset", "17"], 2, "opset 17"),
        (["--trt", "--flavour", "rtx", "--refittable"], 2, "--refittable"),
        (["--bundle", "--flavour", "rtx", "--refittable"], 2, "without --refittable"),
        (["--batch", "8,1,32"], 2, "MIN <= OPT <= MAX"),
        (["--image-size", "2"], 2, "--image-size"),
    ],
)
def test_what_cannot_be_done_is_said_in_three_lines(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: str
):
    monkeypatch.setattr(cuda_driver, "probe_driver", lambda: None)
    model = "torchvision/alexnet" if "--image-size" in arguments else MODEL
    size = [] if "--image-size" in arguments else ["--image-size", "16"]
    result = call("--model", model, *size, *arguments)
    assert result.exit_code == code, result.output
    message = result.stderr[result.stderr.rfind("error:") :]
    assert words in message
    assert len(message.splitlines()) <= 3
    assert not (tmp_path / "exports").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "w.safetensors"], "--weights goes with --model"),
        (["--model", MODEL, "--dense"], "--dense goes with a run"),
        (["--model", MODEL, "--run", "runs/latest"], "--run goes with a run"),
        (["--flavour", "rtx"], "add --trt or --bundle"),
        (["--dry-run"], "--dry-run goes with --torch-trt, without --trt"),
        (["--dry-run", "--torch-trt", "--trt"], "--dry-run goes with --torch-trt, without --trt"),
        (["--dry-run", "--torch-trt", "--triton"], "--triton is of files, which a --dry-run does not write"),
        (["--dry-run", "--torch-trt", "--fresh"], "--fresh is of files"),
        (["--dry-run", "--torch-trt", "--opset", "20"], "--opset is of files"),
        (["--onnx", "--refittable"], "add --trt or --bundle"),
        (["--bundle", "--timing-cache", "cache"], "--timing-cache is of the machine that builds"),
        (["--precision", "fp16", "--quantiser", "modelopt"], "--quantiser is for --precision int8 or fp8"),
        (["--precision", "fp8", "--quantiser", "ort"], "--quantiser ort is for int8"),
        (["--trust-engine"], "--trust-engine goes with --check-engine"),
        (["--from-bundle", "b", "--precision", "fp16"], "--precision does not go with --from-bundle"),
        (["--check-engine", "model.engine", "--trt"], "--trt does not go with --check-engine"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(call, arguments: list[str], words: str):
    result = call(*arguments)
    assert (result.exit_code, words in result.stderr) == (2, True), result.stderr


def test_what_was_not_compared_is_said(call, tmp_path: Path):
    images = write_image_folder(tmp_path / "images", classes=2)
    result = call("--model", MODEL, "--classes", 3, "--image-size", 16, "--batch", "1,2,4", "--images", images)
    assert result.exit_code == 0, result.output
    assert "has random weights" in result.stderr
    assert "has 2 classes, the network 3: accuracy is not compared" in result.stderr
    said = " ".join(result.output.split())  # lines end at the width of the terminal
    assert "accuracy was not compared: no labels" in said
    assert "noise" not in said


def test_a_run_that_is_no_bundle_says_so(call, tmp_path: Path):
    result = call("--from-bundle", tmp_path)
    assert (result.exit_code, "manifest.json" in result.stderr) == (2, True)


def test_what_a_killed_export_has_left_is_removed_by_the_next(tmp_path: Path):
    for name in ("model.onnx", ".hidden", ".unproven-x3/model.onnx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    _remove_drafts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", ".hidden"}


def test_an_export_that_ends_between_a_file_and_its_record_leaves_a_whole_run(
    tiny_run: prune.RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("onnxruntime", reason="extra cpu is not installed")
    run = Path(shutil.copytree(tiny_run.path, tmp_path / "tiny-0001", ignore=shutil.ignore_patterns(".lock")))
    with RunFolder.open(run, write=True) as folder:  # what other tests have exported, and some of them deleted
        for name in [name for name in folder.manifest() if name.startswith("export/")]:
            folder.remove(name)
    export_run(run, ExportSettings(batch=(1, 2, 4)))

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(RunFolder, "record_existing", end)
        with pytest.raises(KeyboardInterrupt):
            export_run(run, ExportSettings(batch=(1, 2, 8)))
    folder = RunFolder.open(run)
    assert not folder.has("export/model.onnx")  # which of the two it is nobody knows
    assert all(folder.verified(name) for name in folder.manifest())
    export_run(run, ExportSettings(batch=(1, 2, 8)))
    assert RunFolder.open(run).verified("export/model.onnx")
