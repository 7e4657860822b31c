"""`passdeploy bench`: every format and precision that works here in one table, and why the others are not in it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from passdeploy.commands import bench
from passdeploy.commands.prune import RunResult
from passdeploy.display.bench_table import bench_table
from passdeploy.errors import ExportError
from passdeploy.export import ExportSettings
from passdeploy.profiling import Candidate, Setting
from passdeploy.runs.folder import RunFolder
from passdeploy.runtime.events import silent
from tests.command_line import call_command
from tests.conftest import copy_run

ROW = {"format": "ONNX Runtime", "precision": "int8", "file": "bench/model-int8.onnx", "size_bytes": 1_400_000}
TIMES = {"median_ms": 0.352, "ci95_rel": 0.01, "speedup": 2.9, "speedup_ci": [2.8, 3.0]}


def test_the_table_fits_and_names_what_was_skipped_once():
    untimed = dict.fromkeys(TIMES, None)
    skipped = [{"format": "Torch-TensorRT", "precision": one, "reason": "not installed"} for one in ("fp32", "fp16")]
    table = bench_table(
        {
            "rows": [
                {**ROW, **TIMES, "top1": 0.9812, "images": 512, "notes": []},
                {**ROW, **untimed, "format": "TensorRT for RTX", "top1": None, "images": None, "notes": ["built here"]},
            ],
            "skipped": skipped,
            "batch": 1,
            "threads": 2,
            "device": "cpu",
        }
    )
    assert table.rows[0] == ("ONNX Runtime", "int8", "1.4 MB", "98.12 %", "0.352 ±1%", "2.90x (2.80–3.00)", "")
    assert table.rows[1][3:] == ("–", "–", "–", "1")
    assert "skipped Torch-TensorRT fp32, Torch-TensorRT fp16: not installed" in table.notes
    assert max(map(len, table.text(80).splitlines())) <= 80


def test_a_run_is_exported_and_measured_in_every_precision(
    tiny_run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = copy_run(tiny_run, tmp_path)
    with RunFolder.open(run, write=True) as folder:
        folder.write_text("export/model.onnx", "what the user has exported", kind="onnx")
    monkeypatch.chdir(tmp_path)
    arguments = ("bench", "--precision", "fp32,fp8", "--seconds", "0.1", "--batch", "2", "--device", "cpu")
    done = call_command(*arguments, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    rows = {(row["format"], row["precision"]): row for row in document["rows"]}
    assert {("PyTorch", "fp32"), ("ONNX Runtime", "fp32")} <= set(rows)
    assert rows["ONNX Runtime", "fp32"]["images"] == rows["PyTorch", "fp32"]["images"] == 16
    assert all(row["median_ms"] > 0 for row in rows.values() if row["format"] != "TensorRT for RTX")
    skipped = {(one["format"], one["precision"]) for one in document["skipped"]}
    assert skipped.isdisjoint(rows)
    assert {format_name for format_name, _ in {*skipped, *rows}} >= {"PyTorch", "ONNX Runtime", "TensorRT for RTX"}
    files = [row["file"] for row in document["rows"] if row["format"] != "PyTorch"]
    assert "bench/model.onnx" in files
    assert all((run / file).is_file() for file in files)
    assert [path.name for path in (run / "export").iterdir()] == ["model.onnx"]
    assert RunFolder.open(run).read_text("export/model.onnx") == "what the user has exported"
    assert json.loads((run / "bench.json").read_text())["rows"] == document["rows"]
    assert call_command("bench", "--precision", "fp4").exit_code == 2


def test_a_dense_network_that_cannot_be_exported_is_a_reason_and_not_the_end(
    tiny_run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(folder: RunFolder, name: str, *_: object, **__: object) -> None:
        tried.append(name)
        raise ExportError(f"the {name} network cannot be exported.\nChange it.")

    tried: list[str] = []
    monkeypatch.setattr(bench, "export_network", fail)
    document = bench.bench_run(
        copy_run(tiny_run, tmp_path), precisions=("fp32", "fp16"), device="cpu", seconds=0.1, threads=1
    )
    assert [row["format"] for row in document["rows"]] == ["PyTorch"]
    reasons = [one["reason"] for one in document["skipped"] if one["format"] == "ONNX Runtime"]
    assert reasons == ["the dense network cannot be exported. Change it."] * 2
    assert tried[:2] == ["dense", "slim"]  # it is not tried again for every precision


def test_a_program_of_any_precision_is_measured_against_the_dense_network_in_fp32(monkeypatch: pytest.MonkeyPatch):
    pairs: list[tuple[str, str]] = []

    def export(_: object, name: str, settings: ExportSettings) -> list[Any]:
        return [SimpleNamespace(kind="program", path=Path(f"{name}-{settings.precisions[0]}.pt2"))]

    def measure(_: object, backend: str, dense: Candidate, slim: Candidate, precision: str) -> None:
        assert dense.program is not None
        assert slim.program is not None
        pairs.append((dense.program.name, slim.program.name))

    monkeypatch.setattr(bench, "_export", export)
    monkeypatch.setattr(bench, "load_torch_trt", lambda _: None)
    monkeypatch.setattr(bench._Bench, "measure", measure)
    monkeypatch.setattr(bench._Bench, "add", lambda *_: None)
    folder: Any = None
    measured = bench._Bench(folder, Setting("cuda"), 1, 1, 1.0, False, silent, [], [])
    for precision in ("fp32", "fp16"):
        bench._bench_program(measured, precision)
    assert pairs == [("dense-fp32.pt2", "slim-fp32.pt2"), ("dense-fp32.pt2", "slim-fp16.pt2")]
