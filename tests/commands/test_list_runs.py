"""`passdeploy runs`, `compare` and `report`: what is listed of finished, stopped and damaged runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from passdeploy.commands.list_runs import find_runs, finished_runs
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.numbering import WRITER, list_runs
from tests.command_line import call_command
from tests.report.conftest import ROWS, MakeRun, make_run  # noqa: F401 - a fixture


@pytest.fixture
def project(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A folder with a finished, a stopped and a damaged run."""
    make_run("done")
    with RunFolder.create(tmp_path / "runs", "stopped") as folder:
        folder.mark_done("dense", {"top1": 0.9})
    damaged = make_run("broken")
    with (damaged / "summary.json").open("a") as stream:
        stream.write(" ")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_are_listed_with_their_state(project: Path):
    listed = call_command("runs", "list")
    assert listed.exit_code == 0
    lines = {line.split()[0]: line for line in listed.stdout.splitlines() if "-0001 " in line}
    assert "95.0 % → 94.5 %  -50.0 %  2.00x" in lines["done-0001"]
    assert "stopped after dense" in lines["stopped-0001"]
    assert "damaged" in lines["broken-0001"]
    assert "is not the file that was written" in listed.stdout.replace("\n", " ")
    document = json.loads(call_command("runs", "list", "--json").stdout)
    assert {run["name"] for run in document["runs"]} == {"done-0001", "stopped-0001", "broken-0001"}
    assert call_command("runs").stdout == listed.stdout
    assert call_command("runs", "list", "--out", "nowhere").exit_code == 2


def test_a_run_that_another_process_writes_is_running(project: Path):
    with RunFolder.create(project / "runs", "now") as folder:
        states = {run["name"]: run["state"] for run in find_runs(project / "runs")}
        assert states["now-0001"] == "running"
        folder.mark_done("dense", {"top1": 0.9})
        note = (folder.path / WRITER).read_text()
        states = {run["name"]: run["state"] for run in find_runs(project / "runs")}
        assert states["now-0001"] == "running, after dense"
    (folder.path / WRITER).write_text(note)  # as if the process had been killed, and this one had its number
    states = {run["name"]: run["state"] for run in find_runs(project / "runs")}
    assert states["now-0001"] == "stopped after dense"


def test_runs_are_sorted_by_number_and_found_by_their_name_alone(project: Path):
    runs = project / "runs"
    for number in ("9999", "10000"):
        (runs / "done-0001").rename(runs / f"done-{number}") if number == "9999" else shutil.copytree(
            runs / "done-9999", runs / "done-10000"
        )
    assert [path.name for path in list_runs(runs) if path.name.startswith("done")] == ["done-9999", "done-10000"]
    shown = call_command("runs", "show", "done-10000")
    assert (shown.exit_code, "Do you mean runs/done-10000?" in shown.stderr) == (2, True)


def test_runs_of_one_name_are_told_apart_by_their_folders(project: Path):
    shutil.copytree(project / "runs" / "done-0001", project / "other" / "done-0001")
    compared = call_command("compare", "runs/done-0001", "other/done-0001", "--json")
    names = {network["name"] for network in json.loads(compared.stdout)["networks"]}
    assert {"runs/done-0001", "other/done-0001"} <= names


def test_a_run_that_is_deleted_meanwhile_is_not_listed(project: Path, monkeypatch: pytest.MonkeyPatch):
    gone = project / "runs" / "gone-0001"
    monkeypatch.setattr("passdeploy.commands.list_runs.list_runs", lambda out: (*list_runs(out), gone))
    assert "gone-0001" not in {run["name"] for run in find_runs(project / "runs")}


def test_a_run_is_shown_with_all_its_tables(project: Path):
    shown = call_command("runs", "show", "runs/done-0001")
    assert shown.exit_code == 0
    for expected in ("Deploy it. It is", "what was cut", "64 → 24", "torchvision/resnet18", "ort, fp32, batch 8"):
        assert expected in shown.stdout
    assert call_command("runs", "show", "runs/stopped-0001").exit_code == 2
    assert call_command("runs", "show", "runs/broken-0001").exit_code == 5


def test_finished_runs_are_compared_without_naming_them(project: Path):
    compared = call_command("compare")
    assert compared.exit_code == 0, compared.output
    assert "done-0001" in compared.stdout
    assert compared.stdout.splitlines()[-1] == "comparison.html"
    assert "done-0001" in (project / "comparison.html").read_text()
    document = json.loads(call_command("compare", "runs/done-0001", "--out", "other.html", "--json").stdout)
    assert [one["name"] for one in document["networks"]] == ["dense resnet18", "done-0001"]
    assert call_command("compare", "--out", "nowhere.html/x.html", "runs/stopped-0001").exit_code == 2


def test_a_damaged_manifest_leaves_a_run_out_of_the_comparison_and_no_more(project: Path):
    (project / "runs" / "stopped-0001" / "manifest.json").write_text("{}")
    assert [facts.name for facts in finished_runs(project / "runs")] == ["done-0001"]
    states = {run["name"]: run["state"] for run in find_runs(project / "runs")}
    assert states == {"done-0001": "finished", "stopped-0001": "damaged", "broken-0001": "damaged"}


def test_a_speed_up_that_cannot_be_told_from_none_is_not_listed(project: Path, make_run: MakeRun):  # noqa: F811
    rows = [ROWS[0], {**ROWS[1], "speedup": 1.2, "speedup_ci": [0.9, 1.6]}]
    make_run("unclear", latency=rows)
    listed = call_command("runs").stdout.splitlines()
    assert "not measurable" in next(line for line in listed if line.startswith("unclear-0001"))
