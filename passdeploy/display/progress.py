"""What a person sees while a run goes on, all of it on stderr; stdout belongs to results.

On a terminal: one line per finished stage, and below them a bar with the time left for what is running.
Elsewhere (a log file, a CI job): plain lines when a stage starts and ends, and on long stages one about
every 20 seconds. The listener only shows events; what they mean is decided by those who send them.
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
from rich.text import Text

from passdeploy.display.units import duration
from passdeploy.runtime.events import Event, StageFinished, StageStarted, Step, Warned

PLAIN_EVERY_S = 20.0


@dataclass
class _Running:
    """A stage that has begun."""

    text: str
    began_s: float
    spoke_s: float
    first_done: int = 0  # steps an earlier process had done, before this one's first
    task: TaskID | None = None


class TerminalListener:
    """Shows events. Use it in a `with` block, so that the bar is taken down whatever happens inside.

    Args:
        console: where to; None is stderr.
        quiet: show warnings and nothing else.
        clock: seconds, for the time between lines.
    """

    def __init__(
        self, console: Console | None = None, *, quiet: bool = False, clock: Callable[[], float] = monotonic
    ) -> None:
        self.console = console or Console(file=sys.stderr)
        self._quiet, self._clock = quiet, clock
        self._running: dict[str, _Running] = {}
        self._bar: Progress | None = None
        is_utf8 = self.console.encoding.lower().startswith("utf")
        self._done_mark, self._stop_mark = ("✓", "✗") if is_utf8 else ("ok", "x")

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Warned):
            self._say(f"warning: {event.text}", style="yellow")
        elif self._quiet:
            return
        elif isinstance(event, StageStarted):
            self._start(event)
        elif isinstance(event, Step):
            self._step(event)
        else:
            self._finish(event)

    def __enter__(self) -> TerminalListener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar down, and name the stages that did not finish."""
        for name, running in self._running.items():
            seconds = duration(self._clock() - running.began_s)
            if self.console.is_terminal:
                self._line(self._stop_mark, "red", name, "stopped", seconds)
            else:
                self._say(f"{name}: stopped after {seconds}")
        self._running.clear()
        self._lower()

    def _start(self, event: StageStarted) -> None:
        now = self._clock()
        running = self._running[event.stage] = _Running(event.text, now, now)
        if self.console.is_terminal:
            running.task = self._raised().add_task(event.stage, total=event.total, text=event.text)
        else:
            self._say(f"{event.stage}: {event.text}" if event.text else event.stage)

    def _step(self, event: Step) -> None:
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
        elif self._clock() - running.spoke_s >= PLAIN_EVERY_S:
            running.spoke_s = self._clock()
            made = event.done - running.first_done + 1
            left = (running.spoke_s - running.began_s) / made * (event.total - event.done)
            parts = [f"{event.done}/{event.total}", metrics, f"about {duration(left)} left"]
            self._say(f"{event.stage}: " + "  ".join(part for part in parts if part))

    def _finish(self, event: StageFinished) -> None:
        running = self._running.pop(event.stage, None)
        if running and running.task is not None and self._bar:
            self._bar.remove_task(running.task)
        text = event.text or (running.text if running else "")
        seconds = "from before" if event.is_skipped else duration(event.seconds)
        if self.console.is_terminal:
            self._line(self._done_mark, "green", event.stage, text, seconds)
        else:
            how = seconds if event.is_skipped else f"done in {seconds}"
            self._say(f"{event.stage}: {how}" + (f"  {text}" if text else ""))
        if not self._running:
            self._lower()

    def _line(self, mark: str, style: str, stage: str, text: str, seconds: str) -> None:
        line = Text.assemble((mark, style), " ", (f"{stage:<12}", "bold"), " ", text, " ", (seconds, "dim"))
        self.console.print(line, soft_wrap=True, highlight=False)

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(Text(text), style=style, soft_wrap=True, highlight=False)

    def _raised(self) -> Progress:
        """The bar, up."""
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

    def _lower(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


class _CountColumn(ProgressColumn):
    """`120/300`, once the steps are known."""

    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed)}/{int(task.total)}" if task.total else "", style="cyan")
