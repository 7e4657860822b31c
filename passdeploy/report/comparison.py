"""Comparison of runs: accuracy over latency and over multiply-adds, with the networks that no other one beats in both.

Latencies are compared only where they were measured alike: in the same backend, precision, batch, device, threads and
options, and on the same model of processor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from markupsafe import Markup

from passdeploy.display.listing import Listing
from passdeploy.display.units import milliseconds, quantity
from passdeploy.errors import UNKNOWN, UsageError, percent
from passdeploy.report.charts import Point, scatter_chart
from passdeploy.report.page_parts import Grid, style_sheet, templates
from passdeploy.report.run_facts import RunFacts
from passdeploy.report.verdict import BACKENDS, judge, preference
from passdeploy.runtime.intervals import accuracy_interval

_ALIKE = ("backend", "precision", "batch", "device", "threads", "options")


@dataclass(frozen=True)
class Candidate:
    """A network of the comparison: the slim one of a run, or a dense one that runs started from."""

    name: str
    method: str  # empty for a dense network
    top1: float
    interval: tuple[float, float] | None
    macs: int
    params: int
    ms: float | None  # in the setting that all runs share; None where it was not measured
    ms_interval: tuple[float, float] | None
    verdict: str  # empty for a dense network
    is_best_by_macs: bool = False
    is_best_by_ms: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side."""

    candidates: tuple[Candidate, ...]
    setting: str  # that latencies were measured in; empty where the runs share none
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `compare --json`."""
        networks = [candidate.to_json() for candidate in self.candidates]
        return {"latency_in": self.setting or None, "networks": networks, "notes": list(self.notes)}

    def table(self) -> Listing:
        """Build the table of all networks, the most accurate first."""
        rows = []
        for number, one in enumerate(self.candidates, start=1):
            front = [mark for mark, is_best in (("MACs", one.is_best_by_macs), ("ms", one.is_best_by_ms)) if is_best]
            latency = UNKNOWN if one.ms is None else milliseconds(one.ms)
            best = ", ".join(front)
            rows.append((str(number), one.name, one.method, percent(one.top1, 2), quantity(one.macs), latency, best))
        headings = ("", "network", "method", "top-1", "MACs", "latency", "best by")
        notes = [f"latency: {self.setting}"] if self.setting else []
        notes.append("best by: no other network is at least as accurate and needs less (Pareto front)")
        return Listing(headings, tuple(rows), notes=(*notes, *self.notes), left=frozenset({1, 2, 6}))


def compare(runs: Sequence[RunFacts]) -> Comparison:
    """Lay runs side by side.

    Raises:
        UsageError: there are none.
    """
    if not runs:
        raise UsageError("nothing to compare: name runs, such as passdeploy compare runs/a-0001 runs/b-0001.")
    setting = _shared_setting(runs)
    found = [_candidate(facts, "slim", setting, name) for facts, name in zip(runs, _names(runs), strict=True)]
    candidates = sorted([*_dense(runs, setting), *found], key=lambda one: (-one.top1, one.macs, one.name))
    by_macs = _front(candidates, lambda one: one.macs)
    by_ms = _front(candidates, lambda one: one.ms)
    marked = tuple(replace(one, is_best_by_macs=one in by_macs, is_best_by_ms=one in by_ms) for one in candidates)
    return Comparison(marked, _setting_text(setting), tuple(_notes(runs, setting)))


def render_comparison(comparison: Comparison) -> str:
    """Write the comparison as one HTML page that needs nothing else."""
    charts: list[tuple[str, Markup]] = []
    if sum(one.ms is not None for one in comparison.candidates) > 1:
        charts.append((f"Accuracy over latency ({comparison.setting})", _chart(comparison, "latency in ms")))
    charts.append(("Accuracy over multiply-adds", _chart(comparison, "multiply-adds in millions")))
    title = f"{len(comparison.candidates)} networks side by side"
    grid = Grid.of(comparison.table(), "All networks, the most accurate first")
    page = templates().get_template("comparison.html.j2")
    verdicts = [(one.name, one.verdict) for one in comparison.candidates if one.verdict]
    return page.render(style=style_sheet(), title=title, charts=charts, grid=grid, verdicts=verdicts)


def _chart(comparison: Comparison, label: str) -> Markup:
    """Draw accuracy over one cost; numbers are those of the table."""
    is_time = label.startswith("latency")
    points = []
    for number, one in enumerate(comparison.candidates, start=1):
        x = one.ms if is_time else one.macs / 1e6
        if x is None:
            continue
        low, high = one.interval or (None, None)
        x_low, x_high = (one.ms_interval or (None, None)) if is_time else (None, None)
        is_best = one.is_best_by_ms if is_time else one.is_best_by_macs
        points.append(Point(one.name, x, one.top1, low, high, is_best, x_low, x_high, str(number)))
    names = "; ".join(f"{point.label}: {point.name}, {percent(point.y, 2)} at {point.x:.3g}" for point in points)
    return scatter_chart(f"Top-1 over {label}. {names}", points, x_label=label, y_label="top-1")


def _data_name(facts: RunFacts) -> str:
    """Name the data of a run, with its folder if it has one."""
    data = facts.recipe.data
    return data.name if data.root is None else f"{data.name} {data.root}"


def _names(runs: Sequence[RunFacts]) -> list[str]:
    """Name the runs by their folders, with the path where two folders have one name."""
    counts = Counter(facts.name for facts in runs)
    return [facts.name if counts[facts.name] == 1 else str(facts.shown_path) for facts in runs]


def _candidate(facts: RunFacts, which: str, setting: tuple[Any, ...] | None, name: str = "") -> Candidate:
    """Describe one network of a run; `name` is that of the slim one."""
    summary, is_slim = facts.summary, which == "slim"
    numbers = summary[which]
    own = [row for row in facts.rows if row["model"] == which]
    row = next((row for row in own if setting and _setting_of(row, facts) == setting), None)
    images = facts.test_images
    half = float(row["ci95_rel"]) if row and row.get("ci95_rel") is not None else None
    ms = float(row["median_ms"]) if row else None
    return Candidate(
        name=name if is_slim else f"dense {summary['model'].rpartition('/')[2]}",
        method=str(summary["method"]) if is_slim else "",
        top1=float(numbers["top1"]),
        interval=accuracy_interval(numbers["top1"], images) if images else None,
        macs=int(numbers["macs"]),
        params=int(numbers["params"]),
        ms=ms,
        ms_interval=(ms * (1 - half), ms * (1 + half)) if ms is not None and half is not None else None,
        verdict=judge(facts).sentence if is_slim else "",
    )


def _dense(runs: Sequence[RunFacts], setting: tuple[Any, ...] | None) -> list[Candidate]:
    """Describe the dense networks of the runs, each once; those of one model are named after a run as well."""
    found: list[tuple[str, Candidate]] = []  # name of the network, without that of a run
    for facts in runs:
        one = _candidate(facts, "dense", setting)
        same_model = [other for name, other in found if name == one.name]
        if all((other.top1, other.macs) != (one.top1, one.macs) for other in same_model):
            name = f"{one.name} of {facts.name}" if same_model else one.name
            found.append((one.name, replace(one, name=name)))
    return [one for _, one in found]


def _setting_of(row: Mapping[str, Any], facts: RunFacts) -> tuple[Any, ...] | None:
    """Return all that a latency depends on besides the network; None where a row, of an older version, lacks some."""
    if not row.keys() >= set(_ALIKE):
        return None
    alike = (tuple(row[key]) if isinstance(row[key], list) else row[key] for key in _ALIKE)
    return (*alike, facts.processor_of(row))


def _shared_setting(runs: Sequence[RunFacts]) -> tuple[Any, ...] | None:
    """Return the setting in which all runs were measured, the one that is nearest to deployment; None without one.

    Of several in one backend and with one batch it is the first of the first run.
    """
    first, *others = [[_setting_of(row, facts) for row in facts.rows] for facts in runs]
    shared = [one for one in first if one is not None and all(one in other for other in others)]
    return min(shared, key=lambda one: (preference(one[0]), one[2] or 0), default=None)


def _setting_text(setting: tuple[Any, ...] | None) -> str:
    if setting is None:
        return ""
    backend, precision, batch, device, threads, options, processor = setting
    place = device if device == "cpu" else processor or device
    parts = [BACKENDS.get(backend, backend), precision, f"batch {batch}", place, *(options or ())]
    return ", ".join(
        map(str, [*parts, *([f"{threads} thread{'s' if threads > 1 else ''}"] if threads and device == "cpu" else [])])
    )


def _front(candidates: Sequence[Candidate], cost: Callable[[Candidate], float | None]) -> list[Candidate]:
    """Return the candidates that no other one beats: at least as accurate, at most as costly, and better in one."""
    known = [(one, value) for one in candidates if (value := cost(one)) is not None]
    return [
        one
        for one, mine in known
        if not any(
            other.top1 >= one.top1 and theirs <= mine and (other.top1 > one.top1 or theirs < mine)
            for other, theirs in known
        )
    ]


def _notes(runs: Sequence[RunFacts], setting: tuple[Any, ...] | None) -> list[str]:
    """Say what must not be compared."""
    notes = []
    if setting is None:
        notes.append(
            "the runs were not measured on the same processor in the same backend, precision, batch, threads and "
            "options, so latencies cannot be compared: passdeploy profile each of them in the same way"
        )
    if len(sets := sorted({_data_name(facts) for facts in runs})) > 1:
        notes.append(f"these are accuracies on different data ({', '.join(sets)}), which cannot be compared")
    elif len({facts.test_images for facts in runs}) > 1:
        notes.append("accuracies were counted on different numbers of test images")
    measured_on = {frozenset(str(facts.processor_of(row)) for row in facts.rows) for facts in runs if facts.rows}
    if setting is None and len(measured_on) > 1:
        notes.append(
            f"they were measured on different processors: {', '.join(sorted(frozenset().union(*measured_on)))}"
        )
    return notes
