"""The benchmark of latency targets on a GPU: which cells are measured in which order, and what is written when."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_targets
from passdeploy.errors import MissingError


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        networks=("wide", "narrow"),
        batches=(8, 1),
        backends=("compile", "tensorrt"),
        seconds=100.0,
        out=tmp_path / "t.json",
    )


def row_of(cell: gpu_targets.Cell, found: float) -> dict[str, Any]:
    row = {"network": cell.network, "batch": cell.batch, "backend": cell.backend, "asked": 0.5, "found": found}
    table = {"table_seconds": 1.0, "table_error": (0.01, 0.1), "dense_ms": 1.0, "search_seconds": 1.0}
    return {**row, **table, "found_ci": (found, found), "trials": [found], "macs": 0.4}


def test_every_row_is_written_at_once_and_a_missing_backend_is_named(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
):
    on_disk: list[int] = []

    def measure_cell(cell: gpu_targets.Cell, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
        if cell.backend == "tensorrt":
            raise MissingError("TensorRT is not installed.\nInstall it.")
        yield row_of(cell, 0.5)
        on_disk.append(len(json.loads(options.out.read_text())["rows"]))
        if (cell.network, cell.batch) == ("narrow", 1):
            raise RuntimeError("out of memory")
        yield row_of(cell, 0.4)

    monkeypatch.setattr(gpu_targets, "measure_cell", measure_cell)
    results = gpu_targets.run(options)
    assert on_disk == [1, 4, 6, 8]  # the first backend that is missing has a row of its own
    assert [(row["network"], row["batch"]) for row in results.rows if row.get("found") == 0.5] == [
        *(("wide", 8), ("narrow", 8)),
        *(("wide", 1), ("narrow", 1)),
    ]
    document = json.loads(options.out.read_text())
    assert document["rows"][-1]["failed"] == "RuntimeError: out of memory"
    assert document["left_out"] == [
        f"{network}, batch {batch}, tensorrt: TensorRT is not installed."
        for batch, network in ((8, "narrow"), (1, "wide"), (1, "narrow"))
    ]
    assert gpu_targets.summarise(results).startswith("4 of 7 plans within 3 %")


def test_no_cell_is_begun_that_would_not_fit(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]

    def measure_cell(cell: gpu_targets.Cell, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
        now[0] += 45.0 if cell.backend == "tensorrt" else 10.0
        yield row_of(cell, 0.5)

    monkeypatch.setattr(gpu_targets, "perf_counter", lambda: now[0])
    monkeypatch.setattr(gpu_targets, "measure_cell", measure_cell)
    results = gpu_targets.run(options)
    assert now[0] == 85.0  # a cell of tensorrt takes 45 of 100 seconds, so a second one would not fit
    assert [row["backend"] for row in results.rows] == ["compile", "tensorrt", "compile", "compile", "compile"]
    assert len(results.left_out) == 3
    assert all(cell.endswith("tensorrt: no time left") for cell in results.left_out)
