"""Display of progress on a terminal (stages, time left) and in a log file (plain lines)."""

from collections.abc import Iterator
from io import StringIO

import pytest
from rich.console import Console

from passdeploy.display.progress import TerminalListener
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
