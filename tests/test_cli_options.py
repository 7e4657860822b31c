"""What commands share: options of their groups, and the next command, which is printed as it is typed in a shell."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import passdeploy.cli as cli
import passdeploy.cli_export as cli_export
from passdeploy.cli_options import next_run_option
from passdeploy.cli_typed import typed_command
from passdeploy.commands import describe, prune
from passdeploy.commands.export_run import Exported
from passdeploy.errors import UsageError
from passdeploy.export import Artifact
from tests.command_line import Called, call_command


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def next_command(called: Called) -> list[str]:
    """Return the words of the next command as a shell reads them, without its comment."""
    assert called.exit_code == 0, called.output
    line = next(line for line in called.stderr.splitlines() if line.startswith("next: "))
    return shlex.split(line.removeprefix("next: "), comments=True)


def test_a_command_is_quoted_and_has_the_flags_that_are_on():
    assert typed_command("check", "my recipe.yaml", allow_code=True, force=False) == (
        "passdeploy check 'my recipe.yaml' --allow-code"
    )


def test_a_run_is_named_unless_it_is_the_latest(folder: Path):
    (folder / "my runs" / "x-0001").mkdir(parents=True)
    assert next_run_option(Path("my runs/x-0001")) == " --run 'my runs/x-0001'"
    assert next_run_option(Path("runs/latest"), allow_code=True) == " --allow-code"
    (folder / "runs").mkdir()
    (folder / "runs" / "latest").symlink_to("../my runs/x-0001")
    assert next_run_option(Path("my runs/x-0001")) == ""


def test_the_command_after_a_run_names_it(
    tiny_run: prune.RunResult, tiny_recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    run = prune.RunResult(folder / "my runs" / "x-0001", tiny_run.summary)
    monkeypatch.setattr(prune, "run", lambda *_, **__: run)
    done = call_command("prune", tiny_recipe, "--out", "my runs", "--allow-code")
    assert next_command(done) == shlex.split("passdeploy export --onnx --run 'my runs/x-0001' --allow-code")


def test_the_command_after_a_check_keeps_its_options(tiny_recipe: Path, folder: Path):
    recipe = folder / "my recipe.yaml"
    recipe.write_text(tiny_recipe.read_text())
    done = call_command("check", recipe, "--set", "prune.target={macs: 0.5}", "--allow-code")
    options = ["--set", "prune.target={macs: 0.5}", "--allow-code"]
    assert next_command(done) == ["passdeploy", "prune", "--recipe", str(recipe), *options]


def test_an_engine_that_loads_is_measured_next(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "check_engine", lambda *_: {"census": {"layers": 3}})
    done = call_command("export", "--check-engine", "my model.engine", "--trust-engine")
    assert next_command(done) == ["passdeploy", "profile", "my model.engine", "--trust-engine"]


def test_an_engine_of_a_bundle_is_loaded_next(monkeypatch: pytest.MonkeyPatch):
    engine = Artifact(Path("my bundle/model.engine"), "engine", "fp16", "", 1, {"flavour": "rtx"})
    monkeypatch.setattr(cli_export.ExportRequest, "run", lambda *_: Exported(Path("my bundle"), (engine,)))
    done = call_command("export", "--from-bundle", "my bundle")
    assert next_command(done) == ["passdeploy", "export", "--check-engine", "my bundle/model.engine"]


def test_a_group_takes_the_options_of_its_list(folder: Path, tiny_run: prune.RunResult):
    out = tiny_run.path.parent
    assert call_command("recipes", "--json").stdout == call_command("recipes", "list", "--json").stdout
    assert call_command("recipes", "--quiet").stderr == ""
    listed = call_command("runs", "list", "--out", out, "--json")
    assert [run["name"] for run in json.loads(listed.stdout)["runs"]] == [tiny_run.path.name]
    assert call_command("runs", "--out", out, "--json").stdout == listed.stdout
    assert next_command(call_command("runs", "--out", out)) == ["passdeploy", "runs", "show", str(tiny_run.path)]


def test_a_group_passes_its_options_on(tiny_run: prune.RunResult):
    out = tiny_run.path.parent
    listed = call_command("runs", "list", "--out", out, "--json")
    assert call_command("runs", "--out", out, "--json", "list").stdout == listed.stdout
    assert call_command("runs", "--json", "show", tiny_run.path).stdout.startswith("{")
    assert json.loads(call_command("recipes", "--json", "show", "mobilenetv2").stdout)["name"] == "mobilenetv2"
    refused = call_command("runs", "--out", out, "show", tiny_run.path)
    assert refused.exit_code == 2
    assert "--out goes with `runs list`, not with show." in refused.stderr


@pytest.mark.parametrize(("model", "size"), [("passdeploy/resnet20_cifar", 32), ("torchvision/inception_v3", 299)])
def test_a_network_is_inspected_at_the_size_that_it_was_made_for(
    model: str, size: int, monkeypatch: pytest.MonkeyPatch
):
    def refuse(name: str, *, image_size: int, **_: object) -> None:
        raise UsageError(f"{name} at {image_size}")

    monkeypatch.setattr(describe, "inspect_model", refuse)
    assert f"{model} at {size}\n" in call_command("inspect", model).stderr
    assert f"{model} at 64\n" in call_command("inspect", model, "--image-size", 64).stderr
