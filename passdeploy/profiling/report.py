"""Report of a profile: its rows and environment, as they stand in profile.json, with notes on what limits a claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from passdeploy.profiling.runners import Runner
from passdeploy.profiling.statistics import LatencySummary, Speedup

NO_DIFFERENCE = "no measurable difference"
_UNSTABLE_ABOVE = 0.03  # relative half-width of the median's 95 % interval


@dataclass(frozen=True)
class ExtraMetrics:
    """Measurements of a network other than its latency."""

    enqueue_ms: float | None = None  # time the host takes to queue a call; None where nothing is queued
    copy_ms: float | None = None  # time to copy the batch from the host to the device; None on a CPU
    memory_mb: float | None = None  # MiB of the device, weights and activations included; None on a CPU
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """The measurements of one network on one backend at one batch size."""

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
    def in_words(self) -> str:
        """The result in short: `ort batch 8: 1.62x`, or that there is no measurable difference."""
        claim = NO_DIFFERENCE if NO_DIFFERENCE in self.notes else f"{self.speedup:.2f}x"
        return f"{self.backend} batch {self.batch}: {claim}"


@dataclass(frozen=True)
class SkippedBackend:
    """A backend that was not asked for by name and cannot run here."""

    backend: str
    reason: str

    @classmethod
    def of(cls, backend: str, error: Exception) -> SkippedBackend:
        """Take the reason from an error, in one line."""
        return cls(backend, " ".join(str(error).split()) or type(error).__name__)

    @property
    def in_words(self) -> str:
        """The sentence for the user."""
        return f"{self.backend} is left out: {self.reason}"


@dataclass(frozen=True)
class Profile:
    """All rows of a profile, the environment they were measured in, and the backends that were left out."""

    environment: Mapping[str, Any]
    rows: tuple[Row, ...]
    skipped: tuple[SkippedBackend, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the content of profile.json in plain lists and dicts."""
        lists = ("speedup_ci", "notes", "options")
        rows = [{**asdict(row), **{key: list(getattr(row, key)) for key in lists}} for row in self.rows]
        skipped = [asdict(backend) for backend in self.skipped]
        return {"environment": dict(self.environment), "rows": rows, "skipped": skipped}


def make_row(
    runner: Runner,
    summary: LatencySummary,
    speedup: Speedup | None,
    extra: ExtraMetrics,
    *,
    batch: int,
    threads: int,
    options: tuple[str, ...] = (),
) -> Row:
    """Make a row of the table; `speedup` is None for the network that others are compared with."""
    notes = []
    if speedup is not None and not speedup.is_measurable:
        notes.append(NO_DIFFERENCE)
    if summary.ci95_rel > _UNSTABLE_ABOVE:
        notes.append(f"unstable: the median is known to ±{summary.ci95_rel:.0%}")
    return Row(
        model=runner.name,
        artifact=runner.artifact,
        backend=runner.backend,
        device=runner.device,
        precision=runner.precision,
        batch=batch,
        median_ms=summary.median_ms,
        p90_ms=summary.p90_ms,
        p99_ms=summary.p99_ms,
        ci95_rel=summary.ci95_rel,
        images_per_s=1e3 * batch / summary.median_ms,
        speedup=speedup.ratio if speedup else 1.0,
        speedup_ci=(speedup.low, speedup.high) if speedup else (1.0, 1.0),
        notes=(*notes, *extra.notes),
        n=summary.n,
        p95_ms=summary.p95_ms,
        cv=summary.cv,
        threads=threads,
        options=options,
        enqueue_ms=extra.enqueue_ms,
        copy_ms=extra.copy_ms,
        memory_mb=extra.memory_mb,
    )
