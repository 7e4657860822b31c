"""`passdeploy bench`: every format and precision that works here in one table, and why the others are not in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from passdeploy.commands.prune import RunResult
from passdeploy.display.bench_table import bench_table
from tests.command_line import call_command
from tests.conftest import copy_run

ROW = {"format": "ONNX Runtime", "precision": "int8", "file": "export/model-int8.onnx", "size_bytes": 1_400_000}
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
    assert json.loads((run / "bench.json").read_text())["rows"] == document["rows"]
    assert call_command("bench", "--precision", "fp4").exit_code == 2
