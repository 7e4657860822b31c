"""The commands as a user types them: exit codes, results on stdout, and no tracebacks for a user's mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from passdeploy.errors import AccuracyError
from passdeploy.recipe import Recipe, shipped_recipes
from passdeploy.runs.folder import RunFolder
from tests.command_line import call_command
from tests.conftest import write_image_folder


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    return call_command


@pytest.fixture(scope="module")
def runs(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with one run by the command."""
    folder = tmp_path_factory.mktemp("project")
    result = call_command("prune", "--recipe", tiny_recipe, "--out", folder / "runs", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["summary"]["recipe"] == "tiny"
    assert Path(document["run"]).name == "tiny-0001"
    return folder


def test_help_takes_less_than_a_third_of_a_second_and_no_torch():
    code = (
        "import sys; from passdeploy.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({'torch', 'onnx', 'onnxruntime', 'torchvision', 'pydantic'} & set(sys.modules)))"
    )
    seconds = []  # of the processor, which other processes of the machine do not change
    for _ in range(3):
        began = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        ended = os.times()
        seconds.append(ended.children_user + ended.children_system - began.children_user - began.children_system)
    assert done.stdout.rstrip().endswith("[]")
    assert min(seconds) < 0.3


def test_a_run_is_exported_and_profiled_with_the_default_paths(call, runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(runs)
    exported = call("export", "--batch", "1,2,4")
    assert exported.exit_code == 0, exported.output
    assert exported.stdout.splitlines()[0].startswith("file ")
    megabytes = f"{(runs / 'runs/tiny-0001/export/model.onnx').stat().st_size / 1e6:.1f}"
    assert exported.stdout.splitlines()[2].split()[:5] == ["model.onnx", "fp32", megabytes, "MB", "opset"]
    assert exported.stdout.splitlines()[-1] == "runs/tiny-0001/export/model.onnx"
    assert exported.stderr.splitlines()[-1] == "next: passdeploy profile"
    profiled = call("profile", "--backend", "ort", "--batch", "2", "--seconds", "0.2", "--json")
    assert profiled.exit_code == 0, profiled.output
    document = json.loads(profiled.stdout)
    assert document["path"] == "runs/tiny-0001/profile.json"
    assert [row["model"] for row in document["rows"]] == ["dense", "slim"]
    assert "next:" not in profiled.output
    quiet = call("profile", "--backend", "ort", "--batch", "2", "--seconds", "0.2", "--quiet")
    assert quiet.stdout == "runs/tiny-0001/profile.json\n"
    assert "profile:" not in quiet.stderr
    assert "next:" not in quiet.stderr


def test_layers_of_a_run_are_laid_side_by_side_in_pytorch(call, runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(runs)
    profiled = call("profile", "--backend", "torch", "--batch", "2", "--seconds", "0.2", "--layers", "--json")
    assert profiled.exit_code == 0, profiled.output
    document = json.loads(profiled.stdout)
    names = [layer["name"] for layer in document["layers"]]
    assert len(names) > 2
    assert {layer["group"] for layer in document["layers"]} >= {document["groups"][0]["group"]} - set(names)
    again = ("profile", "--backend", "torch", "--batch", "2", "--seconds", "0.2", "--layers")
    assert json.loads(call(*again, "--json").stdout) == document
    shown = call(*again, "--top", "2")
    assert shown.stdout.index("time by layer (traced in ") < shown.stdout.index("time by channel group")
    assert "torch, fp32, batch 2" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "latencies and layers of profile.json" in shown.stderr
    table = call(*again, "--csv").stdout
    assert table.splitlines()[0].startswith("name,dense_ms,slim_ms")
    assert len(table.splitlines()) == len(names) + 1
    assert call("profile", "--top", "2").exit_code == 2
    missing = call("profile", "--backend", "tensorrt", "--batch", "2")
    assert missing.exit_code == 2
    assert "passdeploy export --dense --trt" in missing.stderr


def test_a_positional_recipe_is_as_good_as_an_option(call, tiny_recipe: Path):
    checked = call("check", tiny_recipe, "--json")
    assert checked.exit_code == 0, checked.output
    document = json.loads(checked.stdout)
    assert document["images"] == {"train": 48, "test": 16}
    assert document["groups"][0]["name"] == "conv1"
    both = call("check", tiny_recipe, "--recipe", tiny_recipe)
    assert both.exit_code == 2


def test_inspect_names_what_stays_and_why(call):
    result = call("inspect", "torchvision/resnet18", "--image-size", "64", "--json")
    document = json.loads(result.stdout)
    groups = {group["name"]: group for group in document["groups"]}
    assert groups["fc"]["reason"] == "the model's output"
    assert groups["layer1.0.conv1"]["is_prunable"]
    assert groups["layer1.0.conv1"]["layers"] == ["layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2"]
    assert 0 < groups["layer1.0.conv1"]["macs_share"] < groups["conv1"]["macs_share"] < 1
    assert document["smallest"]["macs"] < 0.05 * document["macs"]
    blocks = {block["name"]: block for block in document["blocks"]}
    assert blocks["layer1.1"]["is_prunable"]
    assert 0 < blocks["layer1.1"]["macs_share"] < 0.2 < blocks["layer4.1"]["params_share"] < 1
    assert blocks["layer2.0"]["reason"] == "both summands are computed from its input, as where the shape changes"
    assert blocks["layer2.0"]["source"].startswith("resnet.py:")
    shown = call("inspect", "torchvision/resnet18", "--image-size", "64")
    assert "12 of 13 channel groups can be cut" in shown.stdout
    assert "5 of 8 blocks can be skipped" in shown.stdout
    assert "layer4.1.conv1" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_recipes_are_listed_shown_and_described(call):
    assert "mobilenetv2 " in call("recipes").stdout
    assert json.loads(call("recipes", "list", "--json").stdout)["recipes"] == shipped_recipes()
    assert "torchvision/mobilenet_v2" in call("recipes", "show", "mobilenetv2").stdout
    assert json.loads(call("recipes", "schema").stdout)["properties"]["prune"]


def test_doctor_says_what_works_here(call):
    shown = call("doctor").stdout
    assert "torch-tensorrt" in shown[shown.index("made for each other") :]
    assert max(map(len, shown.splitlines())) <= 80
    document = json.loads(call("doctor", "--json").stdout)
    assert document["versions"]["passdeploy"]
    assert document["can"]["check and profile ONNX"] == {"ok": True, "why": ""}
    assert document["starts"]["ort"]["ok"]
    assert bool(document["gpus"]) == torch.cuda.is_available()


def mistakes(tmp_path: Path) -> dict[str, tuple[list[str], int, str]]:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "version: 1\nmodel: {name: torchvision/resnet18}\ndata: {name: digits, image_size: 32}\n"
        "prune:\n  target: {macs: 0.5}\n  stepz: 10\n"
    )
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"\x00" * 64)
    alone = write_image_folder(tmp_path / "alone", classes=1, images=3)
    broken = write_image_folder(tmp_path / "broken", images=3)
    (broken / "test" / "class1" / "000.png").write_bytes(b"\x89PNG\r\n")
    folder = ["--set", "data.name=imagefolder", "--set"]
    ours = ["prune", "mobilenetv2"]
    table = ["profile", "--table", "t.json", "--model", "torchvision/resnet18", "--backend", "ort", "--batch", "8"]
    return {
        "no recipe": (["prune"], 2, "give one recipe"),
        "no such recipe": (["prune", "mobilnetv2"], 2, "mobilenetv2.yaml"),
        "unknown key": (["prune", str(recipe)], 2, r"mine\.yaml:6.*prune\.stepz(.|\n)*prune\.steps"),
        "unreachable budget": ([*ours, "--set", "prune.target.macs=0.001"], 4, "smallest that can be reached"),
        "unknown model": ([*ours, "--set", "model.name=torchvision/mobilenet_v9"], 2, "mobilenet_v"),
        "code not allowed": ([*ours, "--set", "model.name=os.path:join"], 2, "--allow-code"),
        "damaged weights": ([*ours, "--set", f"model.weights={weights}"], 5, r"weights\.safetensors"),
        "missing weights": ([*ours, "--set", "model.weights=gone.safetensors"], 2, r"gone\.safetensors"),
        "missing folder": ([*ours, *folder, "data.root=gone"], 2, "gone"),
        "damaged image": ([*ours, *folder, f"data.root={broken}"], 5, r"000\.png"),
        "one class": ([*ours, *folder, f"data.root={alone}"], 5, "only one class"),
        "no such run": (["export", "--run", "runs/none"], 2, "there is no run at runs/none"),
        "no run yet": (["profile"], 2, "passdeploy prune"),
        "no GPU": ([*ours, "--device", "cuda:9"], 3, "cuda:9"),
        "odd batch": (["profile", "--batch", "8,none"], 2, "8,none"),
        "no GPU to profile on": (["profile", "--device", "cuda:7"], 3, "asked for cuda:7"),
        "no such device": (["profile", "--device", "tpu"], 2, "no device is called 'tpu'"),
        "layers of a file": (["profile", "--layers", "a.onnx"], 2, "--layers lays two networks of a run"),
        "files in two backends": (["profile", "--backend", "ort,torch", "a.onnx"], 2, "a file runs in one backend"),
        "table in fp16": ([*table, "--precision", "fp16"], 2, "in fp32"),
        "unknown option": (["prune", "--fast"], 2, "--fast"),
    }


MISTAKES = (
    "no recipe",
    "no such recipe",
    "unknown key",
    "unreachable budget",
    "unknown model",
    "code not allowed",
    "damaged weights",
    "missing weights",
    "missing folder",
    "damaged image",
    "one class",
    "no such run",
    "no run yet",
    "no GPU",
    "odd batch",
    "no GPU to profile on",
    "no such device",
    "layers of a file",
    "files in two backends",
    "table in fp16",
    "unknown option",
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained_in_three_lines_and_leaves_nothing(call, tmp_path: Path, mistake: str):
    arguments, code, expected = mistakes(tmp_path)[mistake]
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    message = result.stderr[result.stderr.lower().rfind("error:") :]
    assert re.search(expected, message), message
    assert len(message.rstrip().splitlines()) <= 3
    assert not (tmp_path / "runs").exists()
    as_json = call(*arguments, "--json")
    assert as_json.exit_code == code
    assert json.loads(as_json.stdout)["error"]["exit_code"] == code


def test_an_interrupt_exits_with_130(call, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch):
    import passdeploy.commands.prune

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(passdeploy.commands.prune, "run", interrupted)
    stopped = call("prune", tiny_recipe, "--set", "seed=7")
    assert stopped.exit_code == 130
    assert f"go on with: passdeploy prune {tiny_recipe} --set seed=7\n" in stopped.stderr  # there is no run yet
    as_json = call("prune", tiny_recipe, "--json")
    assert json.loads(as_json.stdout)["error"] == {"kind": "Interrupted", "message": "interrupted", "exit_code": 130}

    def interrupted_later(recipe: Recipe, out: Path, **_: object) -> None:
        with RunFolder.create(out, recipe.name) as folder:
            folder.write_text("recipe.resolved.yaml", recipe.to_yaml())
        raise KeyboardInterrupt

    monkeypatch.setattr(passdeploy.commands.prune, "run", interrupted_later)
    stopped = call("prune", tiny_recipe, "--set", "prune.target={macs: 0.5}")
    command = f"passdeploy prune {tiny_recipe} --set 'prune.target={{macs: 0.5}}' --resume"
    assert f"go on with: {command}\n" in stopped.stderr
    assert not Path("runs/latest").exists()


def test_the_run_whose_network_lost_too_much_is_named(call, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch):
    import passdeploy.commands.prune

    def lost(*_: object, **__: object) -> None:
        raise AccuracyError("lost", run="runs/tiny-0007")

    monkeypatch.setattr(passdeploy.commands.prune, "run", lost)
    assert json.loads(call("prune", tiny_recipe, "--json").stdout)["error"]["run"] == "runs/tiny-0007"


@pytest.mark.parametrize(
    "arguments",
    [
        ("profile", "--seconds", "nan"),
        ("profile", "--seconds", "inf"),
        ("profile", "--threads", "100000"),
        ("export", "--precision", "int8", "--max-drop", "nan"),
        ("inspect", "torchvision/resnet18", "--weights", "~nobody-of-that-name/w.safetensors"),
        ("recipes", "show", "binary.yaml"),
    ],
)
def test_numbers_that_are_none_and_files_that_are_no_text_are_refused(call, arguments: tuple[str, ...]):
    Path("binary.yaml").write_bytes(b"\xff\xfe name")
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output


def test_a_network_without_channels_is_no_traceback(call):
    Path("odd.py").write_text("from torch import nn\n\ndef net():\n    return nn.Flatten()\n")
    result = call("inspect", "odd:net", "--allow-code")
    assert result.exit_code == 2, result.output


def test_a_bug_keeps_its_traceback(call, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch):
    import passdeploy.commands.prune

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(passdeploy.commands.prune, "run", broken)
    result = call("prune", tiny_recipe)
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.skipif(os.name == "nt", reason="pipes end in another way there")
@pytest.mark.parametrize(("arguments", "code"), [(["recipes", "schema"], 141), (["recipes", "show", "none"], 2)])
def test_a_command_whose_reader_has_gone_ends_without_a_word(arguments: list[str], code: int, tmp_path: Path):
    reading, writing = os.pipe()
    os.close(reading)
    program = "import sys; from passdeploy.cli import main; main(sys.argv[1:])"
    with (tmp_path / "errors").open("w+") as errors:
        # an error has no reader either
        streams = {"stdout": writing, "stderr": errors if code == 141 else writing}
        done = subprocess.run([sys.executable, "-c", program, *arguments], check=False, **streams)
        os.close(writing)
        errors.seek(0)
        assert (done.returncode, errors.read()) == (code, "")


def test_no_folder_for_temporary_files_is_one_error(call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    table = ("profile", "--table", "t.json", "--model", "passdeploy/resnet20_cifar")
    result = call(*table, "--backend", "ort", "--batch", 1)
    assert result.exit_code == 3
    assert re.fullmatch(
        r"error: there is no folder for temporary files.*\n.*'/nowhere'\]\nMake room .* TMPDIR\.",
        result.stderr[result.stderr.index("error: ") :].rstrip(),
    )
