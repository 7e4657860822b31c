"""Display on a terminal (stages, time left, tables) and in a log file (plain lines)."""

from collections.abc import Iterator
from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from passdeploy.display.progress import TerminalListener
from passdeploy.display.tables import layer_table, profile_table, summary_table
from passdeploy.runtime.events import StageFinished, StageStarted, Step, Warned, stage


class Clock:
    """A clock in seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def plain(width: int = 40) -> Console:
    return Console(file=StringIO(), width=width, force_terminal=False)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Console]:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return Console(file=StringIO(), width=120, force_terminal=True, color_system=None)


def shown(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def table_text(*arguments: object) -> str:
    console = plain(120)
    console.print(summary_table(*arguments))  # type: ignore[arg-type]
    return shown(console)


def test_elsewhere_than_on_a_terminal_there_are_plain_lines_of_any_length():
    console = plain()
    with TerminalListener(console) as tell, stage("dense", "8 epochs of a long explanation [b]", tell) as now:
        now.text = "top-1 97.8 % after eight epochs"
    tell(StageFinished("plan", "as before", 0.0, is_skipped=True))
    assert shown(console).splitlines() == [
        "dense: 8 epochs of a long explanation [b]",
        "dense: done in 0.0 s  top-1 97.8 % after eight epochs",
        "plan: from before  as before",
    ]


def test_a_long_stage_says_every_twenty_seconds_how_long_it_will_take():
    console, clock = plain(), Clock()
    tell = TerminalListener(console, clock=clock)
    tell(StageStarted("dense", ""))
    for done in range(501, 506):  # resumed: the first 500 steps took this process no time
        clock.now_s += 10
        tell(Step("dense", done, 510, {"loss": 0.25}))
    assert shown(console).splitlines() == [
        "dense",
        "dense: 502/510  loss 0.25  about 1 min 20 s left",
        "dense: 504/510  loss 0.25  about 1 min 0 s left",
    ]


def test_on_a_terminal_a_finished_stage_is_one_line_and_the_bar_is_gone(screen: Console):
    with TerminalListener(screen) as tell:
        with stage("dense", "8 epochs", tell, total=3) as now:
            for done in (1, 2, 3):
                now.step(done, 3, loss=0.5)
            now.text = "top-1 97.8 %"
        assert tell._bar is None
    assert "✓ dense        top-1 97.8 % 0.0 s" in shown(screen)


def test_a_stage_that_is_running_shows_steps_and_metrics(screen: Console):
    with TerminalListener(screen) as tell:
        tell(StageStarted("dense", "8 epochs"))
        tell(Step("dense", 501, 1000, {"loss": 0.5, "top1": 0.25}))
        assert tell._bar is not None
        tell._bar.refresh()
    assert "501/1000" in shown(screen)
    assert "loss 0.5  top1 0.25" in shown(screen)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_stage_that_fails_is_named_and_the_bar_is_taken_down(screen: Console, is_terminal: bool):
    console = screen if is_terminal else plain()

    def fail() -> None:
        with TerminalListener(console, clock=Clock()) as tell, stage("dense", "", tell):
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError):
        fail()
    assert ("✗ dense        stopped 0.0 s" if is_terminal else "dense: stopped after 0.0 s") in shown(console)
    assert shown(console).count("\x1b[?25l") == shown(console).count("\x1b[?25h")  # the cursor is back


def test_quiet_leaves_the_warnings():
    console = plain()
    tell = TerminalListener(console, quiet=True)
    tell(StageStarted("dense", "8 epochs"))
    tell(Step("dense", 1, 2))
    tell(Warned("[careful]"))
    tell(StageFinished("dense", "done", 1.0))
    tell.close()
    assert shown(console) == "warning: [careful]\n"


def test_everything_goes_to_stderr(capsys: pytest.CaptureFixture[str]):
    with TerminalListener() as tell, stage("dense", "8 epochs", tell):
        pass
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "dense: 8 epochs" in captured.err


def test_what_a_command_prints_while_the_bar_is_up_stays_on_stdout(screen: Console, capsys: pytest.CaptureFixture[str]):
    with TerminalListener(screen) as tell, stage("dense", "8 epochs", tell):
        print("a result")
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in shown(screen)


def test_the_summary_table_sets_slim_beside_dense():
    summary = {
        "model": "torchvision/mobilenet_v2",
        "dense": {"top1": 0.9781, "params": 2_236_682, "macs": 24_900_000},
        "slim": {"top1": 0.97, "params": 1_118_341, "macs": 12_450_000},
    }
    measurement = {"backend": "ort", "precision": "fp32", "batch": 8, "device": "a CPU"}
    rows = [
        {"model": "dense", **measurement, "median_ms": 12.34},
        {"model": "slim", **measurement, "median_ms": 7.0, "speedup": 1.763},
        {"model": "slim", **measurement, "batch": 1, "median_ms": 1.5},
    ]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in table_text(summary, rows).splitlines()]
    assert ["top-1", "97.81 %", "97.00 %", "-0.81 points"] in cells
    assert ["parameters", "2.24 M", "1.12 M", "-50.0 %"] in cells
    assert ["MACs", "24.9 M", "12.4 M", "-50.0 %"] in cells
    assert ["latency ort, fp32, batch 8", "12.3 ms", "7 ms", "1.76x faster"] in cells
    assert ["latency ort, fp32, batch 1", "–", "1.5 ms", "–"] in cells
    assert "latency: median on a CPU" in table_text(summary, rows)


def test_what_is_not_known_is_a_dash():
    text = table_text({"dense": {"top1": None, "params": 10}, "slim": {}})
    assert [line.count("–") for line in text.splitlines() if "│ " in line] == [3, 2, 3]


def as_text(table: Table) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_speed_up_is_shown_with_its_interval_or_not_at_all():
    row = {
        "model": "a.onnx",
        "batch": 1,
        "median_ms": 2.0,
        "p90_ms": 2.1,
        "p99_ms": None,
        "images_per_s": 500.0,
        "speedup": 1.0,
        "speedup_ci": [1.0, 1.0],
        "notes": [],
    }
    faster = {**row, "model": "b.onnx", "speedup": 1.5, "speedup_ci": [1.4, 1.6]}
    slower = {**row, "speedup": 0.5, "speedup_ci": [0.4, 0.6], "notes": ["unstable: the median is known to ±9%"]}
    alike = {**row, "speedup": 1.1, "speedup_ci": [0.9, 1.2], "notes": ["no measurable difference"]}
    text = as_text(profile_table([row, faster, slower, alike]))
    assert "1.50x faster (1.40 to 1.60)" in text
    assert "2.00x slower (0.40 to 0.60); unstable" in text
    assert text.count("no measurable difference") == 1
    assert "1.10x" not in text


def test_a_layer_that_is_no_faster_says_why():
    layers = [
        {
            "name": "layer1",
            "dense_ms": 1.0,
            "slim_ms": 0.5,
            "dense_channels": [64, 64],
            "slim_channels": [20, 64],
            "why": "20 channels are computed as 32",
        },
        {
            "name": "(between layers)",
            "dense_ms": 0.1,
            "slim_ms": 0.0,
            "dense_channels": [],
            "slim_channels": [],
            "why": "",
        },
    ]
    text = as_text(layer_table(layers))
    assert "64, 64 → 20, 64" in text
    assert "2.00x" in text
    assert "20 channels are computed as 32" in text
