"""Dense against slim on this machine: which runs, in what order, and the table that comes out.

Every backend and batch size is one comparison of the two networks, measured in turns. A speed-up is
only claimed with an interval that leaves 1 out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passdeploy.errors import UsageError
from passdeploy.events import Listener, Warned, silent, stage
from passdeploy.profiling.clock import Clock, HostClock
from passdeploy.profiling.environment import peak_memory_mb, physical_cores, read_environment
from passdeploy.profiling.measure import Budget, measure_one, measure_pair
from passdeploy.profiling.runners import PROVIDERS, CompiledRunner, OrtRunner, Runner, TorchRunner, torch_threads
from passdeploy.profiling.statistics import Speedup, Summary, is_measurable, speedup, summarise

BACKENDS = ("torch", "ort", "compile", "ort-cuda", "ort-trt")
NO_DIFFERENCE = "no measurable difference"
FULL_SECONDS, FULL_ITERATIONS = 3.0, 1000  # what trtexec's method and a p99 ask for at least
_UNSTABLE_ABOVE = 0.03  # of ci95_rel
_BUSY_ABOVE = 0.3  # cores that others use before we start


@dataclass(frozen=True)
class Subject:
    """One of the two networks compared, in the forms that can be run."""

    name: str  # "dense" or "slim"
    module: nn.Module | None = None  # for "torch"
    onnx: Path | None = None  # for "ort"
    weights: str = ""  # the file the module came from, for the record


@dataclass(frozen=True)
class Row:
    """One network on one backend at one batch size."""

    model: str
    artifact: str
    backend: str
    device: str
    precision: str
    batch: int
    median_ms: float
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

    @property
    def is_faster(self) -> bool:
        """Whether it is measurably faster than what it was compared with."""
        return self.speedup_ci[0] > 1.0 and is_measurable(*self.speedup_ci)


@dataclass(frozen=True)
class Profile:
    """What was measured, and on what."""

    environment: Mapping[str, Any]
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """The content of profile.json, in plain lists and dicts."""
        rows = [{**asdict(row), "speedup_ci": list(row.speedup_ci), "notes": list(row.notes)} for row in self.rows]
        return {"environment": dict(self.environment), "rows": rows}


def profile_pair(
    dense: Subject,
    slim: Subject | None,
    *,
    image_shape: tuple[int, ...],
    backends: Sequence[str] = ("torch", "ort"),
    batches: Sequence[int] = (1, 8),
    threads: int | None = None,
    seconds: float = 4.0,
    iterations: int | None = None,
    seed: int = 0,
    clock: Clock | None = None,
    tell: Listener = silent,
) -> Profile:
    """Measure both networks on the CPU; a dense row and a slim row per backend and batch size.

    Args:
        dense: what the speed-up is relative to.
        slim: the network that should be faster; None: `dense` is measured by itself.
        image_shape: (3, height, width).
        backends: of "torch", "compile" (torch.compile), "ort" (ONNX Runtime on the CPU), "ort-cuda" and "ort-trt" (its
            CUDA and TensorRT providers).
        batches: images per call.
        threads: of PyTorch and of ONNX Runtime; None takes every physical core of this process.
        seconds: at least this long per comparison, both networks together, warm-up apart.
        iterations: at least this many calls of each network, but no more than a minute of them; None: 1,000, or none
            for a quick look of less than 3 seconds.
        seed: of the input images and of the bootstrap.
        clock: another source of time, for tests.
        tell: hears what happens.

    Raises:
        UsageError: an unknown backend, a batch or a thread count below 1, a form that a subject lacks.
        MissingError, CorruptArtifact: see `open_session`.
    """
    threads = physical_cores() if threads is None else threads
    _check(dense, slim, backends, batches, threads, seconds)
    environment = read_environment(threads=threads)
    _warn_if_busy(environment, tell)
    if iterations is None:
        iterations = FULL_ITERATIONS if seconds >= FULL_SECONDS else 0
    clock, budget = clock or HostClock(), Budget(seconds=seconds, iterations=iterations)
    work = [(backend, batch) for backend in backends for batch in batches]
    rows: list[Row] = []
    names = " and ".join(subject.name for subject in (dense, slim) if subject is not None)
    words = f"{names} in {', '.join(backends)}, {threads} thread{'s' if threads > 1 else ''}"
    with stage("profile", words, tell, total=len(work)) as progress, torch_threads(threads):
        for done, (backend, batch) in enumerate(work, start=1):
            images = torch.randn(batch, *image_shape, generator=torch.Generator().manual_seed(seed))
            runners = [_runner(subject, backend, threads) for subject in (dense, slim) if subject is not None]
            for runner in runners:
                runner.prepare(images)
            if len(runners) == 1:
                alone = measure_one(runners[0], clock, budget)
                rows.append(_row(runners[0], batch, threads, summarise(alone, seed=seed), None))
                progress.step(done, len(work), ms=rows[-1].median_ms)
                continue
            samples = measure_pair(runners[0], runners[1], clock, budget)
            gained = speedup(*samples, seed=seed)
            rows.append(_row(runners[0], batch, threads, summarise(samples[0], seed=seed), None))
            rows.append(_row(runners[1], batch, threads, summarise(samples[1], seed=seed), gained))
            progress.step(done, len(work), speedup=gained.ratio)
        progress.text = "; ".join(_in_words(row) for row in rows if slim is not None and row.model == slim.name)
    return Profile({**environment, "peak_memory_mb": peak_memory_mb()}, tuple(rows))


def _runner(subject: Subject, backend: str, threads: int) -> Runner:
    """The one function that knows which class runs which backend."""
    if backend == "torch" and subject.module is not None:
        return TorchRunner(subject.name, subject.module, artifact=subject.weights)
    if backend == "compile" and subject.module is not None:
        return CompiledRunner(subject.name, subject.module, artifact=subject.weights)
    if backend in PROVIDERS and subject.onnx is not None:
        return OrtRunner(subject.name, subject.onnx, threads=threads, backend=backend)
    missing = "ONNX file" if backend in PROVIDERS else "module"
    raise UsageError(f"the {subject.name} network has no {missing} to run in {backend}.")


def _row(runner: Runner, batch: int, threads: int, found: Summary, gained: Speedup | None) -> Row:
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
        notes=tuple(notes),
        n=found.n,
        p95_ms=found.p95_ms,
        cv=found.cv,
        threads=threads,
    )


def _in_words(row: Row) -> str:
    """`ort batch 8: 1.62x`, or that there is nothing to claim."""
    claim = NO_DIFFERENCE if NO_DIFFERENCE in row.notes else f"{row.speedup:.2f}x"
    return f"{row.backend} batch {row.batch}: {claim}"


def _check(
    dense: Subject,
    slim: Subject | None,
    backends: Sequence[str],
    batches: Sequence[int],
    threads: int,
    seconds: float,
) -> None:
    if unknown := [name for name in backends if name not in BACKENDS]:
        raise UsageError(f"unknown backend {', '.join(unknown)}: choose from {', '.join(BACKENDS)}.")
    if wrong := [batch for batch in batches if batch < 1]:
        raise UsageError(f"batch {wrong[0]} makes no sense: a batch holds at least one image.")
    if threads < 1 or seconds <= 0:
        raise UsageError(f"{threads} threads for {seconds} s makes no sense: both must be above zero.")
    if slim is not None and dense.name == slim.name:
        raise UsageError(f"both networks are called {slim.name!r}; the table could not tell them apart.")


def _warn_if_busy(environment: Mapping[str, Any], tell: Listener) -> None:
    busy, cores = environment["busy_cores"], environment["cores"]
    if busy is not None and busy > _BUSY_ABOVE:
        tell(Warned(f"other processes keep {busy:.1f} of {cores} cores busy: latencies will scatter."))
    for gpu in environment["gpus"]:
        if reasons := gpu.get("throttled_by"):
            tell(Warned(f"{gpu['name']} is throttled ({', '.join(reasons)}): latencies are longer than they need be."))
