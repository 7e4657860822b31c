"""Progress display of a run on stderr, as a listener of events; results go to stdout.

On a terminal: one line per finished stage, and below them a progress bar with the time left for the running stage.
Elsewhere (a log file, a CI job): plain lines when a stage starts and ends, and during long stages one about every
20 seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn
from rich.table import Table
from rich.text import Text

from passdeploy.display.units import duration
from passdeploy.runtime.events import Event, StageFinished, StageStarted, Step, Warned

PLAIN_LINE_EVERY_S = 20.0


@dataclass
class _Running:
    """A stage that has started and not finished."""

    text: str
    started_s: float
    last_line_s: float  # when the last plain line was printed
    first_done: int = 0  # number of the first step of this process; higher than 1 after --resume
    task: TaskID | None = None


class _PlainPipeConsole(Console):
    """A console that leaves it to the command line what to do where nobody reads it any more."""

    def on_broken_pipe(self) -> None:  # rich ends the process here, with exit code 1
        raise BrokenPipeError


class TerminalListener:
    """A listener that shows events on a terminal; as a context manager it removes the progress bar at the end.

    Args:
        console: to print on; None: stderr.
        quiet: show warnings and nothing else.
        clock: function that returns the time in seconds.
    """

    def __init__(
        self, console: Console | None = None, *, quiet: bool = False, clock: Callable[[], float] = monotonic
    ) -> None:
        self.console = console or _PlainPipeConsole(file=sys.stderr)
        self._quiet, self._clock = quiet, clock
        self._running: dict[str, _Running] = {}
        self._bar: Progress | None = None
        is_utf8 = self.console.encoding.lower().startswith("utf")
        self._done_mark, self._stop_mark = ("✓", "✗") if is_utf8 else ("ok", "x")

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Warned):
            self._print_plain(f"warning: {event.text}", style="yellow")
        elif self._quiet:
            return
        elif isinstance(event, StageStarted):
            self._show_start(event)
        elif isinstance(event, Step):
            self._show_step(event)
        else:
            self._show_end(event)

    def __enter__(self) -> TerminalListener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the progress bar and name the stages that did not finish."""
        for name, running in self._running.items():
            elapsed = duration(self._clock() - running.started_s)
            if self.console.is_terminal:
                self._print_stage(self._stop_mark, "red", name, "stopped", elapsed)
            else:
                self._print_plain(f"{name}: stopped after {elapsed}")
        self._running.clear()
        self._remove_bar()

    def _show_start(self, event: StageStarted) -> None:
        now = self._clock()
        running = self._running[event.stage] = _Running(event.text, now, now)
        if self.console.is_terminal:
            running.task = self._show_bar().add_task(event.stage, total=event.total, text=event.text)
        else:
            self._print_plain(f"{event.stage}: {event.text}" if event.text else event.stage)

    def _show_step(self, event: Step) -> None:
        running = self._running.get(event.stage)
        if running is None:
            return
        if not running.first_done:
            running.first_done = event.done
            if running.task is not None and self._bar:  # steps of an earlier process took this one no time
                self._bar.reset(running.task, completed=event.done - 1, total=event.total)
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in event.metrics.items())
        if running.task is not None and self._bar:
            self._bar.update(running.task, completed=event.done, total=event.total, text=metrics or running.text)
        elif self._clock() - running.last_line_s >= PLAIN_LINE_EVERY_S:
            running.last_line_s = self._clock()
            own_steps = event.done - running.first_done + 1
            seconds_left = (running.last_line_s - running.started_s) / own_steps * (event.total - event.done)
            parts = [f"{event.done}/{event.total}", metrics, f"about {duration(seconds_left)} left"]
            self._print_plain(f"{event.stage}: " + "  ".join(part for part in parts if part))

    def _show_end(self, event: StageFinished) -> None:
        running = self._running.pop(event.stage, None)
        if running and running.task is not None and self._bar:
            self._bar.remove_task(running.task)
        text = event.text or (running.text if running else "")
        elapsed = "from before" if event.is_skipped else duration(event.seconds)
        if self.console.is_terminal:
            self._print_stage(self._done_mark, "green", event.stage, text, elapsed)
        else:
            outcome = elapsed if event.is_skipped else f"done in {elapsed}"
            self._print_plain(f"{event.stage}: {outcome}" + (f"  {text}" if text else ""))
        if not self._running:
            self._remove_bar()

    def _print_stage(self, mark: str, style: str, stage: str, text: str, elapsed: str) -> None:
        line = Table.grid(padding=(0, 1))
        line.add_row(Text(mark, style), Text(f"{stage:<12}", "bold"), Text.assemble(text, " ", (elapsed, "dim")))
        self.console.print(line, highlight=False)

    def _print_plain(self, text: str, style: str | None = None) -> None:
        self.console.print(Text(text), style=style, soft_wrap=True, highlight=False)

    def _show_bar(self) -> Progress:
        """Start the progress bar if there is none yet, and return it."""
        if self._bar is None:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=24),
                _CountColumn(),
                TimeLeftColumn(compact=True),
                TextColumn("{task.fields[text]}", style="dim", markup=False),
                console=self.console,
                transient=True,
                redirect_stdout=False,  # results on stdout go where the user sends them
            )
            self._bar.start()
        return self._bar

    def _remove_bar(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


class _CountColumn(ProgressColumn):
    """The column with the steps done and their total, such as `120/300`; empty while the total is unknown."""

    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed)}/{int(task.total)}" if task.total else "", style="cyan")
