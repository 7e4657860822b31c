"""What a person sees while a run goes on, all of it on stderr; stdout belongs to results.

On a terminal: one line per finished stage, and below them a bar with the time left for what is running.
Elsewhere (a log file, a CI job): plain lines when a stage starts and ends, and on long stages one about
every 20 seconds. The listener only shows events; what they mean is decided by those who send them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn
from rich.table import Table
from rich.text import Text

from passdeploy.events import Event, StageFinished, StageStarted, Step, Warned

PLAIN_EVERY_S = 20.0
_UNKNOWN = "–"


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


def closing_table(summary: Mapping[str, Any], profile_rows: Iterable[Mapping[str, Any]] = ()) -> Table:
    """Dense against slim: accuracy and size of a run, and latency where it was measured.

    Args:
        summary: what `summary.json` holds; a number that is missing or null shows as a dash.
        profile_rows: the `rows` of `profile.json`; a slim row pairs with the dense row that was
            measured in the same way.
    """
    dense, slim = summary.get("dense") or {}, summary.get("slim") or {}
    table = Table("", title=summary.get("model"), title_justify="left")
    for heading in ("dense", "slim", "change"):
        table.add_column(heading, justify="right")
    table.add_row("top-1", *_accuracies(dense.get("top1"), slim.get("top1")))
    for label, key in (("parameters", "params"), ("MACs", "macs")):
        before, after = dense.get(key), slim.get(key)
        table.add_row(label, _quantity(before), _quantity(after), _relative(before, after))
    rows = list(profile_rows)
    devices = {str(row["device"]) for row in rows if row.get("device")}
    if len(devices) == 1:
        table.caption, table.caption_justify = f"latency: median on {devices.pop()}", "left"
        rows = [{**row, "device": None} for row in rows]
    unpruned = {_setting(row): row for row in rows if row["model"] == "dense"}
    pruned = {_setting(row): row for row in rows if row["model"] == "slim"}
    for setting in dict.fromkeys([*unpruned, *pruned]):
        before, after = unpruned.get(setting, {}), pruned.get(setting, {})
        table.add_row(
            "latency " + setting,
            _milliseconds(before.get("median_ms")),
            _milliseconds(after.get("median_ms")),
            _claim(after),
        )
    return table


def _claim(row: Mapping[str, Any]) -> str:
    """A speed-up with its interval, or that there is none to speak of."""
    from passdeploy.profiling.statistics import is_measurable  # with it comes torch, which takes a while

    speedup, interval = row.get("speedup"), row.get("speedup_ci")
    if not speedup:
        return _UNKNOWN
    if interval and not is_measurable(*interval):
        return "no measurable difference"
    words = f"{speedup:.2f}x faster" if speedup >= 1 else f"{1 / speedup:.2f}x slower"
    return f"{words} ({interval[0]:.2f} to {interval[1]:.2f})" if interval else words


def latency_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """One line per row of a profile."""
    table = Table(title_justify="left")
    table.add_column("model", overflow="fold")
    for heading in ("batch", "median", "p90", "p99", "images/s", "speed-up"):
        table.add_column(heading, justify="right")
    for row in rows:
        low, high = row["speedup_ci"]
        claim = "" if low == high == 1 else _claim(row)  # the first one is what the other is compared with
        times = (_milliseconds(row[key]) for key in ("median_ms", "p90_ms", "p99_ms"))
        notes = "; ".join(dict.fromkeys(text for text in (claim, *row["notes"]) if text))
        table.add_row(str(row["model"]), str(row["batch"]), *times, f"{row['images_per_s']:.3g}", notes)
    return table


def layer_table(layers: Iterable[Mapping[str, Any]]) -> Table:
    """Where the time of both networks goes, one layer a line."""
    table = Table(title="time by layer (traced)", title_justify="left")
    table.add_column("layer", overflow="fold")
    for heading in ("channels out, in", "dense", "slim", "speed-up"):
        table.add_column(heading, justify="right")
    table.add_column("no faster because", overflow="fold")
    for layer in layers:
        before, after = (", ".join(map(str, layer[f"{which}_channels"])) for which in ("dense", "slim"))
        gained = f"{layer['dense_ms'] / layer['slim_ms']:.2f}x" if layer["slim_ms"] > 0 else _UNKNOWN
        table.add_row(
            layer["name"], before if before == after else f"{before} → {after}", _milliseconds(layer["dense_ms"]),
            _milliseconds(layer["slim_ms"]), gained, layer["why"],
        )  # fmt: skip
    return table


def group_table(groups: Iterable[Mapping[str, Any]]) -> Table:
    """The same by channel group, the slowest first."""
    table = Table(title="time by channel group (traced)", title_justify="left")
    table.add_column("group", overflow="fold")
    for heading in ("layers", "channels", "dense", "slim", "of the slim network"):
        table.add_column(heading, justify="right")
    table.add_column("no faster because", overflow="fold")
    for group in groups:
        before, after = group["dense_width"], group["slim_width"]
        channels = str(before or "") if before == after else f"{before} → {after}"
        table.add_row(
            group["group"], str(len(group["layers"])), channels, _milliseconds(group["dense_ms"]),
            _milliseconds(group["slim_ms"]), f"{group['share']:.0%}", group["why"],
        )  # fmt: skip
    return table


def _setting(row: Mapping[str, Any]) -> str:
    """How a row was measured; rows of one setting compare."""
    options = row.get("options") or ()
    parts = [row.get("backend"), row.get("precision"), f"batch {row.get('batch')}", row.get("device"), *options]
    return ", ".join(str(part) for part in parts if part)


def _accuracies(before: float | None, after: float | None) -> tuple[str, str, str]:
    shown = [_UNKNOWN if value is None else f"{100 * value:.2f} %" for value in (before, after)]
    change = _UNKNOWN if before is None or after is None else f"{100 * (after - before):+.2f} points"
    return shown[0], shown[1], change


def _quantity(value: float | None) -> str:
    """Three digits and a unit.

    >>> _quantity(2_236_682), _quantity(90_210), _quantity(7)
    ('2.24 M', '90.2 k', '7')
    """
    if value is None:
        return _UNKNOWN
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:#.3g}".rstrip(".") + f" {unit}"
    return f"{value:g}"


def _relative(before: float | None, after: float | None) -> str:
    if not before or after is None:
        return _UNKNOWN
    return f"{100 * (after / before - 1):+.1f} %"


def _milliseconds(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.3g} ms"


def duration(seconds: float) -> str:
    """As a person says it.

    >>> duration(0.42), duration(75), duration(7260)
    ('0.4 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
