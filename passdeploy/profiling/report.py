"""What a profile says of one network, and why a reader should, or should not, believe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from passdeploy.profiling.runners import Runner
from passdeploy.profiling.statistics import Speedup, Summary, is_measurable

NO_DIFFERENCE = "no measurable difference"
_UNSTABLE_ABOVE = 0.03  # of ci95_rel


@dataclass(frozen=True)
class ExtraMetrics:
    """What was measured apart from the latency."""

    enqueue_ms: float | None = None  # of the host, until a call was queued; None where nothing is queued
    copy_ms: float | None = None  # of the batch, from the host to the device; None where it is there already
    memory_mb: float | None = None  # MiB of the device: weights, activations and all; None on a CPU
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One network on one backend at one batch size."""

    model: str
    artifact: str
    backend: str
    device: str
    precision: str
    batch: int
    median_ms: float  # on a GPU the device's own time, without copies
    p90_ms: float
    p99_ms: float | None  # None under 1,000 samples
    ci95_rel: float
    images_per_s: float  # one batch after the other, nothing in flight
    speedup: float  # dense median / this median
    speedup_ci: tuple[float, float]  # 95 %
    notes: tuple[str, ...]
    n: int
    p95_ms: float
    cv: float
    threads: int
    options: tuple[str, ...]  # "channels-last", "cuda-graph"
    enqueue_ms: float | None
    copy_ms: float | None
    memory_mb: float | None

    @property
    def is_faster(self) -> bool:
        """Whether it is measurably faster than what it was compared with."""
        return self.speedup_ci[0] > 1.0 and is_measurable(*self.speedup_ci)

    @property
    def in_words(self) -> str:
        """`ort batch 8: 1.62x`, or that there is nothing to claim."""
        claim = NO_DIFFERENCE if NO_DIFFERENCE in self.notes else f"{self.speedup:.2f}x"
        return f"{self.backend} batch {self.batch}: {claim}"


@dataclass(frozen=True)
class Profile:
    """What was measured, and on what."""

    environment: Mapping[str, Any]
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """The content of profile.json, in plain lists and dicts."""
        lists = ("speedup_ci", "notes", "options")
        rows = [{**asdict(row), **{key: list(getattr(row, key)) for key in lists}} for row in self.rows]
        return {"environment": dict(self.environment), "rows": rows}


def row_of(
    runner: Runner,
    found: Summary,
    gained: Speedup | None,
    beside: ExtraMetrics,
    *,
    batch: int,
    threads: int,
    options: tuple[str, ...] = (),
) -> Row:
    """A line of the table; `gained` is None for the network that others are compared with."""
    notes = []
    if gained is not None and not gained.is_measurable:
        notes.append(NO_DIFFERENCE)
    if found.ci95_rel > _UNSTABLE_ABOVE:
        notes.append(f"unstable: the median is known to ±{found.ci95_rel:.0%}")
    return Row(
        model=runner.name,
        artifact=runner.artifact,
        backend=runner.backend,
        device=runner.device,
        precision=runner.precision,
        batch=batch,
        median_ms=found.median_ms,
        p90_ms=found.p90_ms,
        p99_ms=found.p99_ms,
        ci95_rel=found.ci95_rel,
        images_per_s=1e3 * batch / found.median_ms,
        speedup=gained.ratio if gained else 1.0,
        speedup_ci=(gained.low, gained.high) if gained else (1.0, 1.0),
        notes=(*notes, *beside.notes),
        n=found.n,
        p95_ms=found.p95_ms,
        cv=found.cv,
        threads=threads,
        options=options,
        enqueue_ms=beside.enqueue_ms,
        copy_ms=beside.copy_ms,
        memory_mb=beside.memory_mb,
    )
