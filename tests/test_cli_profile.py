"""Options of `passdeploy profile`: those that would have no effect are refused, with what they go with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from passdeploy.commands import latency_table
from tests.command_line import call_command

TABLE = ("--table", "t.json", "--model", "passdeploy/resnet20_cifar", "--backend", "ort", "--batch", "8")
SWEEP = ("--sweep-round", "8", *TABLE[2:])
MEASURED = {"dense_ms": 1.0, "error": {"median": 0.1, "largest": 0.2}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "torchvision/resnet18"), "--model goes with --table or --sweep-round"),
        (("--recipe", "mobilenetv2"), "--recipe goes with --table or --sweep-round"),
        (("--classes", "10"), "--classes goes with --model"),
        (("--image-size", "64"), "--image-size goes with --model or FILEs"),
        (("--shape", "x=1x3"), "--shape goes with FILEs"),
        (("--share", "0.5"), "--share goes with --sweep-round"),  # typed, though it is the default
        (("--fresh",), "--fresh goes with --layers, --table or --sweep-round"),
        (("--top", "3"), "--top says how many layers are shown"),
        (("a.onnx", "--run", "runs/latest"), "--run names a run: leave it out"),
        (("a.onnx", "--model", "x"), "--model goes with --table"),
        (("a.onnx", "--recipe", "x"), "--recipe goes with --table"),
        (("a.onnx", "--fresh"), "--fresh goes with --layers"),
        ((*TABLE, "--run", "runs/latest"), "--run names a run: leave it out"),
        ((*TABLE, "--seconds", "9"), "--seconds goes with a run or FILEs"),
        ((*TABLE, "--csv"), "--csv goes with a run or FILEs"),
        ((*SWEEP, "--csv"), "--csv goes with a run or FILEs"),
        ((*TABLE, "--trust-engine"), "--trust-engine goes with a run or FILEs"),
        ((*TABLE, "--shape", "x=1x3"), "--shape goes with FILEs"),
        ((*TABLE, "--share", "0.4"), "--share goes with --sweep-round"),
        (("--table", "t.json", "--recipe", "x", "--classes", "10"), "--classes goes with --model"),
        (("--table", "t.json", "--recipe", "x", "--image-size", "64"), "--image-size goes with --model"),
        ((*TABLE, "--layers"), "--layers lays two networks of a run side by side"),
        (("--csv", "--json"), "--csv and --json both say what is printed"),
        (("--sweep-round", ""), "is not a list of positive whole numbers"),
        (("--backend", ""), "unknown backend "),
        ((".",), ". is a folder.\nFor a run: passdeploy profile --run ."),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(arguments: tuple[str, ...], message: str):
    refused = call_command("profile", *arguments)
    assert refused.exit_code == 2
    assert message in refused.stderr


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Measure nothing, and keep how a table was asked for."""
    asked: dict[str, object] = {}

    def measure_table(network: object, **options: object) -> dict[str, object]:
        asked.update(options, network=network)
        return {**MEASURED, "path": str(options["path"])}

    monkeypatch.setattr(latency_table, "network_of_recipe", lambda name, **options: (name, options))
    monkeypatch.setattr(latency_table, "network_by_name", lambda name, **options: (name, options))
    monkeypatch.setattr(latency_table, "measure_table", measure_table)
    return asked


def test_options_that_have_an_effect_are_taken(measured: dict[str, object]):
    for arguments in (
        (*TABLE, "--fresh", "--classes", "10", "--image-size", "32", "--threads", "2"),
        (*SWEEP, "--share", "0.4", "--device", "cpu", "--json"),
    ):
        done = call_command("profile", *arguments)
        assert done.exit_code == 0, done.output
    assert (measured["share"], measured["threads"]) == (0.4, 1)


def test_the_command_after_a_table_names_the_recipe_and_is_quoted(measured: dict[str, object]):
    options = ("--backend", "ort", "--batch", "8", "--allow-code")
    done = call_command("profile", "--table", "my t.json", "--recipe", "my recipe.yaml", *options)
    assert done.stdout.splitlines()[-1] == "my t.json"
    expected = "passdeploy prune --recipe 'my recipe.yaml' --set 'prune.measure.table=my t.json' --allow-code"
    last = done.stderr.splitlines()[-1]
    assert last == f"next: {expected}   # with prune.target a latency; on another machine with --force"


def test_a_table_is_not_measured_where_it_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(latency_table, "network_by_name", lambda name, **_: None)
    (folder / "notes.txt").write_text("")
    refused = call_command("profile", "--table", "notes.txt/t.json", *TABLE[2:], "--json")
    assert refused.exit_code == 2
    assert "notes.txt is a file" in json.loads(refused.stdout)["error"]["message"]
