"""The report of a run: what stands in it, that nothing of it is fetched or run, and its size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from passdeploy.models.prompt import PROMPT_KEY
from passdeploy.report import run_facts, sections
from passdeploy.report.run_facts import read_run
from passdeploy.report.write import write_report
from passdeploy.runs.folder import RunFolder
from tests.report import conftest
from tests.report.conftest import LAYERS, NASTY, RECIPE, ROWS, MakeRun


class Page(HTMLParser):
    """The tags and the text of a page."""

    VOID = ("meta", "link", "img", "rect", "path", "polyline", "circle", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report_of(run: Path) -> tuple[str, str]:
    with RunFolder.open(run, write=True) as folder:
        html, markdown = write_report(folder)
    return html.read_text(), markdown.read_text()


def test_the_report_answers_in_its_first_lines(make_run: MakeRun):
    html, markdown = report_of(make_run(profile={"rows": ROWS, "environment": {"cpu": "Imaginary CPU"}}))
    page = Page(html)
    assert page.open == []
    top = page.text[: page.text.index("Dense against slim")]
    for expected in (
        "Deploy it",
        "It is 2.00 times as fast (ONNX Runtime, fp32, batch 8)",
        "95 % interval 1.90 to 2.10",
        "95.00 % dense, 94.50 % slim",
        "10,000 test images",
        "Imaginary CPU, 1 thread",
        "3×10⁻⁷",
        "−50.0 %",
    ):
        assert expected in " ".join(top.split()), expected
    assert markdown.startswith("# made-0001\n\n**Deploy it.** It is 2.00 times as fast")


def test_every_part_of_a_run_is_shown(make_run: MakeRun):
    of = {"backend": "ort", "batch": 8}
    profile = {"rows": ROWS, "layers": LAYERS, "groups": [], "layers_of": of, "environment": {}}
    run = make_run(profile=profile, exports=True, blocks=[{"name": "layer3.1", "macs_saved": 0.1}])
    html, markdown = report_of(run)
    page = Page(html)
    assert html.count('<svg class="chart"') == 4
    assert html.count('src="data:image/png;base64,') == 3
    for expected in (
        "64 → 24",
        "30.0 %",
        "layer3.1",
        "Learning curves",
        "What is left while channels are let go",
        "The learned prompt",
        "no faster because a reason",
        "64×64 → 24×64",
        "model.onnx",
        "24.0 MB",
        "eight",
        "5,000",
        "passdeploy prune --recipe runs/made-0001/recipe.resolved.yaml --device cpu",
        "pip install passdeploy==0.1.0 torch==2.14",
        "equivalence: 1.0e-05",
    ):
        assert expected in page.text, expected
    for expected in ("64 → 24", "layer3.1", "model.onnx", "passdeploy prune --recipe"):
        assert expected in markdown, expected


def test_a_layer_that_went_with_its_block_is_named_and_so_is_how_many_are_left_out(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sections, "_MOST_LAYERS", 1)
    gone = {**LAYERS[0], "dense_ms": 2.0, "slim_channels": [], "slim_ms": 0.0}
    html, _ = report_of(make_run(profile={"rows": ROWS, "layers": [gone, *LAYERS], "groups": [], "environment": {}}))
    assert "64×64 → gone" in html
    assert "the 1 slowest of 3 layers" in html
    assert 'aria-label="layer1.0.conv1: 2.00 ms before, 0 ms after"' in html


@pytest.mark.parametrize(
    ("target", "asked", "has_mark"),
    [("{macs: 0.125}", "12.5 % of the multiply-adds", True), ("{latency_ms: 0.8}", "0.800 ms", False)],
)
def test_a_target_stands_in_the_subtitle_and_a_share_in_the_curve_of_the_budget(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, target: str, asked: str, has_mark: bool
):
    monkeypatch.setattr(conftest, "RECIPE", RECIPE.replace("{macs: 0.5}", target))
    html, _ = report_of(make_run())
    assert f"pruned by pass to {asked}</p>" in html
    assert ('class="mark"' in html) is has_mark


def test_the_command_that_repeats_a_run_allows_the_code_of_its_network(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(conftest, "RECIPE", RECIPE.replace("torchvision/resnet18", "package.module:factory"))
    assert "recipe.resolved.yaml --device cpu --allow-code" in report_of(make_run())[0]


def test_the_prompt_is_that_of_the_slim_network(make_run: MakeRun):
    run = make_run()
    before = read_run(RunFolder.open(run)).prompt
    finetuned = torch.rand(1, 3, 32, 32)
    with RunFolder.open(run, write=True) as folder:
        folder.write_tensors(
            "slim.safetensors", {PROMPT_KEY: finetuned, "weight": torch.zeros(1, dtype=torch.bfloat16)}
        )
    after = read_run(RunFolder.open(run)).prompt
    assert before is not None
    assert after is not None
    assert after.tolist() == finetuned[0].tolist() != before.tolist()


def test_what_was_not_measured_says_how_to_measure_it(make_run: MakeRun):
    page = Page(report_of(make_run())[0])
    assert "passdeploy profile --layers --run runs/made-0001" in page.text
    assert "passdeploy export --run runs/made-0001" in page.text


def test_blocks_that_were_taken_out_are_named_with_what_they_saved(make_run: MakeRun):
    html, markdown = report_of(make_run(blocks=[{"name": "layer3.1", "macs_saved": 0.04, "params_saved": 0.1}]))
    assert "Blocks that were taken out: layer3.1 (4.0 % of the MACs)." in html
    assert "blocks that went: layer3.1 (4.0 % of the MACs)" in markdown
    assert "No block was taken out." in report_of(make_run())[0]


def test_names_of_the_user_are_text_and_never_markup(make_run: MakeRun):
    html, markdown = report_of(make_run(model=NASTY, blocks=[{"name": NASTY, "macs_saved": 0.0}]))
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(NASTY) >= 3  # the class, the model, the block
    assert "<script>" not in html
    assert "<script>" not in markdown.partition("```")[0]


def test_the_report_needs_nothing_else_and_is_small(make_run: MakeRun):
    html, _ = report_of(make_run(profile={"rows": ROWS, "layers": LAYERS * 40, "groups": [], "environment": {}}))
    assert len(html.encode()) < 500_000
    assert "://" not in html
    for tag, attributes in Page(html).tags:
        assert tag not in ("script", "iframe", "object", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert not re.search(r"@import|url\(", html)
    for scheme in ("prefers-color-scheme: dark", "@media print", 'content="width=device-width'):
        assert scheme in html


def test_a_run_of_an_earlier_version_has_a_report_too(make_run: MakeRun):
    run = make_run()
    with RunFolder.open(run, write=True) as folder:
        summary = folder.read_json("summary.json")
        for key in ("groups", "blocks", "images"):
            del summary[key]
        folder.write_json("summary.json", summary, kind="summary")
        folder.remove("sample.png")
    html, _ = report_of(run)
    assert "64 → 24" in html
    assert "How many images the accuracy was counted on is not known" in html


def test_the_report_command_is_quick_and_needs_no_torch(make_run: MakeRun):
    run = make_run()
    code = (
        "import sys; from passdeploy.cli import main\n"
        f"try: main(['report', '--run', {str(run)!r}])\n"
        "finally: print('torch' in sys.modules)"
    )
    seconds = []
    for _ in range(2):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = os.times()  # seconds of the processor, since other programs may keep it busy
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert done.stdout.splitlines()[-3:] == [f"{run}/report.html", f"{run}/report.md", "False"]
    assert done.stdout.startswith("Deploy it" if "Deploy" in done.stdout else "Not yet")
    assert min(seconds) < 2


def test_the_name_of_the_prompt_is_that_of_the_models():
    assert run_facts.PROMPT_KEY == PROMPT_KEY
