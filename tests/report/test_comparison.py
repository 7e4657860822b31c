"""Runs side by side: the Pareto front, what must not be compared, and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from passdeploy.cli import main
from passdeploy.errors import UsageError
from passdeploy.report.comparison import compare, render_comparison
from passdeploy.report.run_facts import RunFacts, read_run
from passdeploy.runs.folder import RunFolder
from tests.report.conftest import NASTY, ROWS, MakeRun
from tests.report.test_page import Page


def facts_of(make_run: MakeRun, name: str, top1: float, macs: int, ms: float, **row: object) -> RunFacts:
    rows = [ROWS[0], {**ROWS[1], "median_ms": ms, **row}]
    run = make_run(name, profile={"rows": rows, "environment": {}}, slim={"top1": top1, "macs": macs}, method="taylor")
    return read_run(RunFolder.open(run))


def measured(facts: RunFacts, rows: list[dict[str, object]], environment: dict[str, object]) -> RunFacts:
    return replace(facts, profile={"rows": rows, "environment": environment})


def test_networks_that_none_beats_are_on_the_front(make_run: MakeRun):
    runs = [
        facts_of(make_run, "good", 0.94, 900_000_000, 2.0),
        facts_of(make_run, "beaten", 0.93, 950_000_000, 1.9),  # by the first in multiply-adds, not in time
        facts_of(make_run, "small", 0.90, 300_000_000, 3.0),
    ]
    comparison = compare(runs)
    marks = {one.name: (one.is_best_by_macs, one.is_best_by_ms) for one in comparison.candidates}
    assert marks == {
        "dense resnet18": (True, True),
        "good-0001": (True, True),
        "beaten-0001": (False, True),
        "small-0001": (True, False),
    }
    assert [row[1] for row in comparison.table().rows] == list(marks)
    assert comparison.setting == "ONNX Runtime, fp32, batch 8, cpu, 1 thread"
    assert max(map(len, comparison.table().text(80).splitlines())) <= 80


def test_latencies_of_other_settings_are_not_compared(make_run: MakeRun):
    runs = [facts_of(make_run, "one", 0.94, 900, 2.0), facts_of(make_run, "two", 0.93, 800, 1.0, threads=2)]
    rows = [{**row, "threads": 2} for row in runs[1].rows]
    other = RunFacts(**{**runs[1].__dict__, "profile": {"rows": rows}})
    comparison = compare([runs[0], other])
    assert {one.ms for one in comparison.candidates} == {None}
    assert "latencies cannot be compared" in comparison.notes[0]
    assert render_comparison(comparison).count('<svg class="chart"') == 1
    with pytest.raises(UsageError, match="nothing to compare"):
        compare([])


@pytest.mark.parametrize(
    ("device", "one", "other"),
    [
        ("cpu", {"cpu": "CPU A"}, {"cpu": "CPU B"}),
        ("cuda", {"cpu": "CPU", "gpus": [{"name": "GPU A"}]}, {"cpu": "CPU", "gpus": [{"name": "GPU B"}]}),
    ],
)
def test_latencies_of_other_processors_are_not_compared(
    make_run: MakeRun, device: str, one: dict[str, object], other: dict[str, object]
):
    facts = facts_of(make_run, "one", 0.94, 900, 2.0)
    rows = [{**row, "device": device} for row in ROWS]
    apart = compare([measured(facts, rows, one), measured(facts, rows, other)])
    assert {candidate.ms for candidate in apart.candidates} == {None}
    assert apart.notes[1].startswith("they were measured on different processors: ")
    assert apart.notes[1].endswith(" A, " + device.upper().replace("CUDA", "GPU") + " B")
    together = compare([measured(facts, rows, one)] * 2)
    assert [candidate.ms for candidate in together.candidates] == [4.0, 2.0, 2.0]
    assert together.notes == ()


def test_of_several_settings_that_are_shared_the_first_is_shown(make_run: MakeRun):
    """A set of settings would be in another order in every process."""
    options = [f"option {number}" for number in range(8)]
    rows = [{**row, "options": [option]} for option in options for row in ROWS]
    facts = facts_of(make_run, "one", 0.94, 900, 2.0)
    runs = [measured(facts, rows, {}), measured(facts, rows[::-1], {})]
    assert compare(runs).setting == "ONNX Runtime, fp32, batch 8, cpu, option 0, 1 thread"


def test_a_dense_network_that_runs_share_is_shown_once(make_run: MakeRun):
    runs = [
        read_run(RunFolder.open(make_run(name, dense={"top1": top1})))
        for name, top1 in (("one", 0.95), ("two", 0.96), ("three", 0.96), ("four", 0.95))
    ]
    dense = [one.name for one in compare(runs).candidates if not one.method]
    assert dense == ["dense resnet18 of two-0001", "dense resnet18"]


def test_rows_that_do_not_say_their_threads_are_not_compared(make_run: MakeRun):
    """Latency targets of earlier versions wrote neither threads nor options into their rows."""
    silent_rows = [{key: value for key, value in row.items() if key not in ("threads", "options")} for row in ROWS]
    runs = [read_run(RunFolder.open(make_run(name, latency=silent_rows))) for name in ("one", "two")]
    comparison = compare(runs)
    assert {one.ms for one in comparison.candidates} == {None}
    assert "latencies cannot be compared" in comparison.notes[0]


def test_the_page_needs_nothing_else_and_escapes_names(make_run: MakeRun):
    runs = [facts_of(make_run, "one", 0.94, 900, 2.0), facts_of(make_run, "two", 0.93, 800, 1.0)]
    summary = {**runs[0].summary, "method": NASTY}
    html = render_comparison(compare([RunFacts(**{**runs[0].__dict__, "summary": summary}), runs[1]]))
    page = Page(html)
    assert page.open == []
    assert NASTY in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    assert "://" not in html
    assert html.count('<svg class="chart"') == 2
    assert "one-0001" in page.text


def test_a_run_that_is_named_twice_is_shown_once(make_run: MakeRun, tmp_path: Path):
    run, link = make_run(), tmp_path / "latest"
    link.symlink_to(run)
    answer = CliRunner().invoke(main, ["compare", str(link), str(run), "--json", "--out", str(tmp_path / "page.html")])
    once = CliRunner().invoke(main, ["compare", str(run), "--json", "--out", str(tmp_path / "page.html")])
    assert answer.exit_code == 0
    assert json.loads(answer.stdout) == json.loads(once.stdout)
