"""Tables of results: what stands in them, and that they can be read in 80 columns."""

from __future__ import annotations

import re
from typing import Any

import pytest

from passdeploy.display.changes import widths_table
from passdeploy.display.check_report import groups_table
from passdeploy.display.exports import exports_table, preview_lines
from passdeploy.display.listing import Listing, csv_text
from passdeploy.display.tables import group_table, layer_table, profile_table, summary_table
from passdeploy.export.reference import ONNX_FILE, PYTORCH

WHY = "its kernel computes 16 channels at a time"
MEASURED = {"backend": "ort", "precision": "fp32", "batch": 8, "device": "a CPU", "options": [], "threads": 2}
SUMMARY = {
    "model": "torchvision/mobilenet_v2",
    "dense": {"top1": 0.9781, "params": 2_236_682, "macs": 4_089_184_256},
    "slim": {"top1": 0.97, "params": 1_118_341, "macs": 2_044_592_128},
}


def cells(listing: Listing) -> list[list[str]]:
    return [list(row) for row in listing.rows]


def assert_narrow(listing: Listing) -> None:
    assert max(map(len, listing.text(80).splitlines())) <= 80


def test_the_summary_sets_slim_beside_dense_and_every_latency_has_its_interval():
    rows = [
        {"model": "dense", **MEASURED, "median_ms": 1190.2, "ci95_rel": 0.004},
        {"model": "slim", **MEASURED, "median_ms": 7.0, "ci95_rel": 0.021, "speedup": 1.76, "speedup_ci": [1.7, 1.8]},
        {"model": "slim", **MEASURED, "batch": 1, "median_ms": 1.5, "ci95_rel": 0.1},
    ]
    table = summary_table(SUMMARY, rows)
    assert ["top-1", "97.81 %", "97.00 %", "-0.81 points"] in cells(table)
    assert ["parameters", "2.24 M", "1.12 M", "-50.0 %"] in cells(table)
    assert ["MACs", "4.09 G", "2.04 G", "-50.0 %"] in cells(table)
    faster = "1.76x faster (1.70–1.80)"
    assert ["ort, fp32, batch 8", "1,190 ms ±1%", "7.00 ms ±3%", faster] in cells(table)
    assert ["ort, fp32, batch 1", "–", "1.50 ms ±10%", "–"] in cells(table)
    assert table.notes[0] == "latency: median on a CPU, 2 CPU threads"
    long = summary_table(SUMMARY, [{**row, "backend": "ort-cuda", "precision": "fp16"} for row in rows])
    assert long.rows[3][3] == "1.76x (1.70–1.80)"
    assert_narrow(long)
    assert "e+" not in table.text()
    assert_narrow(table)


def test_what_is_not_known_is_a_dash():
    table = summary_table({"dense": {"top1": None, "params": 10}, "slim": {}})
    assert [row.count("–") for row in cells(table)] == [3, 2, 3]


@pytest.mark.parametrize(
    ("notes", "threads", "expected"),
    [
        (["disturbed: other processes kept 1.3 cores busy"], 2, r"busy machine \(.*1\.3 cores.*\): try --threads 1"),
        (["disturbed: other processes kept 1.3 cores busy"], 1, r"busy machine .*: measure again when it is idle"),
        (["no measurable difference"], 1, r"0\.95 to 1\.06 times as fast"),
    ],
)
def test_networks_that_could_not_be_told_apart_say_why(notes: list[str], threads: int, expected: str):
    slim = {**MEASURED, "model": "slim", "threads": threads, "notes": notes, "median_ms": 1.0, "ci95_rel": 0.1}
    table = summary_table(SUMMARY, [{**slim, "speedup": 1.01, "speedup_ci": [0.95, 1.06]}])
    assert table.rows[-1][3:] == ("no measurable difference", "1")
    assert re.search("1: .*" + expected, table.notes[-1])
    assert_narrow(table)


def test_rows_that_were_disturbed_share_a_note():
    rows = [
        {
            **MEASURED,
            "model": "slim",
            "batch": batch,
            "notes": [f"disturbed: other processes kept {busy} cores busy"],
        }
        for batch, busy in ((1, 1.5), (8, 2.5))
    ]
    assert summary_table(SUMMARY, rows).notes[-1] == "1: disturbed: other processes kept up to 2.5 cores busy"


def test_files_are_compared_with_the_first_one():
    row = {"batch": 1, "median_ms": 2.0, "ci95_rel": 0.02, "p90_ms": 2.1, "p99_ms": None, "images_per_s": 5000.0}
    first = {**row, "model": "runs/one/export/model.onnx", "speedup": 1.0, "speedup_ci": [1.0, 1.0], "notes": []}
    faster = {**first, "model": "runs/one/export/model-fp16.onnx", "speedup": 1.5, "speedup_ci": [1.4, 1.6]}
    slower = {**faster, "speedup": 0.5, "speedup_ci": [0.4, 0.6], "notes": ["a note"]}
    alike = {**faster, "speedup": 1.1, "speedup_ci": [0.9, 1.2], "notes": ["no measurable difference"]}
    table = profile_table([first, faster, slower, alike])
    assert table.rows[0] == ("model.onnx", "1", "2.00 ±2%", "2.10, –", "5,000", "", "")
    assert [row[5:] for row in table.rows[1:]] == [
        ("1.50x (1.40–1.60)", ""),
        ("0.50x (0.40–0.60)", "1"),
        ("not measurable", "2"),
    ]
    assert_narrow(table)


def layer(name: str, why: str = "", slim_ms: float = 0.0102) -> dict[str, object]:
    times = {"dense_ms": 0.0123, "slim_ms": slim_ms}
    return {"name": name, "dense_channels": (144, 24), "slim_channels": (96, 24), **times, "why": why}


def test_a_reason_is_readable_in_a_narrow_terminal_and_shared_by_rows():
    table = layer_table([layer("features.13.conv.0.0", WHY), layer("conv1"), layer("features.4", WHY)])
    assert table.notes == (f"1: no faster because {WHY}",)
    assert table.rows[0] == ("features.13.conv.0.0", "144×24 → 96×24", "0.0123", "0.0102", "1.21x", "1")
    assert_narrow(table)
    names = {"group": "conv1", "layers": ["conv1"], "dense_width": 256, "slim_width": 128, "share": 0.12}
    groups = group_table([{**names, "dense_ms": 1.2, "slim_ms": 0.8, "why": WHY}])
    assert groups.notes == ("share: of the time of the slim network", f"1: no faster because {WHY}")
    assert layer_table([layer("conv1")]).notes == ()


def test_the_slowest_layers_are_shown_in_the_order_of_a_call():
    table = layer_table([layer("a", slim_ms=1.0), layer("b", slim_ms=3.0), layer("c", slim_ms=6.0)], top=2)
    assert [row[0] for row in table.rows] == ["b", "c"]
    assert table.notes[0] == "1 more take 10 % of the time together (--top, --csv)"


def test_what_stays_says_why_under_the_table():
    reason = "a very long reason why the channels of this layer must stay as they are, with a line of code"
    group = {"name": "classifier.1.with.a.long.name", "width": 1000, "layers": ["a"], "macs_share": 0.0}
    cut = {**group, "name": "conv1", "macs_share": 0.123, "is_prunable": True, "reason": ""}
    kept = {**group, "is_prunable": False, "reason": reason}
    table = groups_table({"model": "torchvision/resnet18", "groups": [cut, kept, kept]})
    assert table.rows == (
        ("conv1", "1000", "1", "12.3 %", ""),
        ("classifier.1.with.a.long.name", "1000", "1", "", "1"),
        ("classifier.1.with.a.long.name", "1000", "1", "", "1"),
    )
    assert_narrow(table)
    assert "classifier.1.with.a.long.name" in table.text(40)  # a name is never folded


def test_widths_are_shown_before_and_after_with_what_they_saved():
    groups = [
        {"name": f"layer{number}", "width": 64, "kept": 64 - number, "macs_saved": number / 100, "latency_saved": 0.01}
        for number in range(40)
    ]
    table = widths_table({"groups": groups, "blocks": [{"name": "layer3.1", "macs_saved": 0.04}]}, most=10)
    assert table is not None
    assert [row[0] for row in table.rows] == [f"layer{number}" for number in range(30, 40)]
    assert table.rows[-1][1:] == ("64 → 25", "39 %", "█████░░░░░░░", "39.0 %", "1.0 %")
    assert table.notes[1:] == (
        "30 more groups saved less; the report shows them all",
        "blocks that went: layer3.1 (4.0 % of the MACs)",
    )
    assert_narrow(table)
    assert widths_table({"model": "of an older run"}) is None


def test_exported_files_are_one_table_with_the_layers_that_stayed_in_fp32():
    parity = {"max_rel_error": 2.3e-1, "top1": 0.98, "reference_top1": 0.985, "real_images": 512}
    graph = {"name": "model-int8.onnx", "kind": "onnx", "precision": "int8", "size_bytes": 1_400_000}
    engine = {**graph, "name": "model-int8-rtx.engine", "kind": "engine"}
    artifacts = [
        {**graph, "facts": {"opset": 20, "parity": parity, "kept": ["node_7"], "kept_modules": ["features.0.0"]}},
        {**engine, "facts": {"flavour": "rtx", "tensorrt": "1.7.0.26"}},
        {**graph, "name": "build.sh", "kind": "bundle", "facts": {}},
    ]
    table = exports_table(artifacts)
    assert table.rows == (
        ("model-int8.onnx", "int8", "1.4 MB", "opset 20", "2e-01", "98.00 % -0.50", "1"),
        ("model-int8-rtx.engine", "int8", "1.4 MB", "RTX 1.7", "–", "–", "2"),
    )
    assert "1: 1 layer kept in fp32: features.0.0" in table.notes
    assert "on 512 images" in table.notes[0]
    assert table.notes[-1] == "1 files of a bundle folder"
    assert_narrow(table)


@pytest.mark.parametrize(
    ("parity", "note"),
    [
        ({"top1": None, "real_images": 0}, "compared on noise only: give real images"),
        ({"top1": None, "real_images": 512}, "accuracy was not compared: no labels"),
        ({"top1": 0.9, "reference_top1": 0.9, "real_images": 512, "compared_with": PYTORCH}, None),
        (
            {"top1": 0.9, "reference_top1": 0.9, "real_images": 512, "compared_with": ONNX_FILE},
            "compared with its ONNX file instead of the PyTorch model, from which it may differ more",
        ),
    ],
)
def test_what_was_not_compared_with_an_exported_file_is_said(parity: dict[str, Any], note: str | None):
    facts = {"flavour": "tensorrt", "tensorrt": "11.4", "parity": {"max_rel_error": 1e-6, **parity}}
    engine = {"name": "model.engine", "kind": "engine", "precision": "fp32", "size_bytes": 1, "facts": facts}
    table = exports_table([engine])
    assert table.rows[0][-1] == ("1" if note else "")
    assert (f"1: {note}" in table.notes) == bool(note)


def test_a_dry_run_is_told_in_lines():
    facts = {
        "network": "slim",
        "precision": "fp16",
        "engines": 2,
        "operators": 200,
        "coverage": 0.995,
        "census": {"products": {"fp16": 52, "fp32": 1}},
        "kept_modules": ["features.1.0"],
        "beyond_range": [],
        "switches": 2,
        "torch_operations": 1,
        "torch_lines": ["digamma net.py:7"],
        "engines_with_fixed_batch": 1,
    }
    assert preview_lines([facts]) == [
        "slim fp16: 2 engines, 200 operators, 99.5 % of them in engines; convolutions and products: 52 fp16, 1 fp32",
        "slim fp16: stay fp32: features.1.0",
        "slim fp16: 1 operators stay in PyTorch, 2 switches: digamma net.py:7",
        "slim fp16: with a fixed batch (--batch N,N,N) 1 engine",
    ]


def test_markdown_and_csv_keep_what_a_name_says():
    table = Listing(("class", "images"), (("<script>|a_b", "7"),), "title")
    assert table.markdown().splitlines() == [
        "**title**",
        "",
        "| class | images |",
        "| :--- | ---: |",
        r"| \<script\>\|a\_b | 7 |",
    ]
    assert csv_text([{"name": "a,b", "notes": ["x", "y"]}, {"name": "c", "ms": None}]).splitlines() == [
        "name,notes,ms",
        '"a,b",x; y,',
        "c,,",
    ]
