"""Profile a pair of networks, dense and slim, on this machine: every backend and batch size, and the table of results.

Every backend and batch size is one comparison of the two networks, measured in turns and over several sessions. A
speed-up is only claimed if its interval leaves 1 out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from passdeploy.errors import PassDeployError, RunError, UsageError, first_line
from passdeploy.profiling.candidates import Candidate, make_runner
from passdeploy.profiling.clock import Clock, clock_of_backend
from passdeploy.profiling.cuda import measure_gpu_memory, side_stream
from passdeploy.profiling.disturbances import OTHERS_BUSY, MachineCounters, find_disturbances
from passdeploy.profiling.environment import default_threads, peak_memory_mb, read_environment
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.interleaved import BUILT_ONCE, SESSIONS, TimeBudget, measure_sessions
from passdeploy.profiling.launch_overhead import launch_note
from passdeploy.profiling.nvml import process_text
from passdeploy.profiling.report import ExtraMetrics, Profile, Row, SkippedBackend, make_row
from passdeploy.profiling.runners import Runner, torch_threads
from passdeploy.profiling.statistics import LatencySummary, speedup_over_sessions, summarise_times
from passdeploy.runtime.device_memory import is_out_of_memory, memory_errors
from passdeploy.runtime.events import Listener, Warned, silent, stage
from passdeploy.runtime.names import ON_GPU

FULL_SECONDS, FULL_ITERATIONS = 3.0, 1000  # trtexec measures at least 3 s; a p99 needs 1,000 calls
_FEW_SESSIONS = 4  # of a shorter profile
_EXTRA_CALLS = 20  # calls for each of the extra metrics


def profile_pair(
    dense: Candidate,
    slim: Candidate | None,
    *,
    image_shape: tuple[int, ...],
    backends: Sequence[str] = ("torch", "ort"),
    optional: Collection[str] = (),
    batches: Sequence[int] = (1, 8),
    threads: int | None = None,
    setting: Setting | None = None,
    seconds: float = 4.0,
    iterations: int | None = None,
    seed: int = 0,
    clock: Clock | None = None,
    listener: Listener = silent,
) -> Profile:
    """Measure both networks; the result has a dense row and a slim row per backend and batch size.

    Args:
        dense: the network that the speed-up is relative to.
        slim: the network that should be faster; None measures `dense` by itself.
        image_shape: (3, height, width).
        backends: of "torch", "compile" (torch.compile), "ort" (ONNX Runtime on the CPU), "ort-cuda" and "ort-trt" (its
            CUDA and TensorRT providers), "tensorrt" (engines), "torch-trt" (programs of Torch-TensorRT).
        optional: those of the backends that are left out, with a warning, if they cannot run here; at least one backend
            must run.
        batches: images per call.
        threads: CPU threads of PyTorch and of ONNX Runtime; None: OMP_NUM_THREADS, or every physical core.
        setting: device, precision, layout, CUDA graph; None: PyTorch in fp32 on the CPU.
        seconds: at least this long per comparison, both networks together, without warm-up.
        iterations: at least this many calls of each network, but no more than a minute of them; None: 1,000, or no
            minimum if `seconds` is below 3.
        seed: of the input images and of the bootstrap.
        clock: another source of time, for tests.
        listener: receives the progress events.

    Raises:
        UsageError: an unknown backend, a batch or a thread count below 1, a form that a candidate lacks, an option that
            a backend does not have, a batch that a file does not take.
        DeviceMemoryError: a batch does not fit into the device's memory.
        MissingError, CorruptArtifact, ExportError: see `make_runner`.
    """
    threads, setting = default_threads() if threads is None else threads, setting or Setting()
    _check_arguments(dense, slim, batches, threads, seconds)
    setting.require_possible(backends)
    environment = read_environment(threads=threads)
    gpus = [device for backend in backends if (device := setting.device_of(backend)).type == "cuda"]
    _warn_if_busy(environment, gpus[0] if gpus else None, listener)
    if iterations is None:
        iterations = FULL_ITERATIONS if seconds >= FULL_SECONDS else 0
    candidates = [candidate for candidate in (dense, slim) if candidate is not None]
    comparison = _Comparison(
        candidates, threads, setting, TimeBudget(seconds=seconds, iterations=iterations), seed, clock
    )
    comparisons = [(backend, batch) for backend in backends for batch in batches]
    rows: list[Row] = []
    failed: dict[str, PassDeployError] = {}
    names = " and ".join(candidate.name for candidate in candidates)
    title = f"{names} in {', '.join(backends)}, {threads} thread{'s' if threads > 1 else ''}"
    with stage("profile", title, listener, total=len(comparisons)) as progress, torch_threads(threads):
        for done, (backend, batch) in enumerate(comparisons, start=1):
            if backend in failed:
                continue
            images = torch.randn(batch, *image_shape, generator=torch.Generator().manual_seed(seed))
            fitting = [row.batch for row in rows if row.backend == backend]
            try:
                with _batch_errors(backend, images, setting, fitting):
                    measured = comparison.measure(backend, images)
            except PassDeployError as error:
                if backend not in optional:
                    raise
                failed[backend] = error
                _release(error)
                continue
            rows += measured
            figure = {"ms": measured[0].median_ms} if slim is None else {"speedup": measured[1].speedup}
            progress.step(done, len(comparisons), **figure)
        if not rows:
            raise next(iter(failed.values()))
        progress.text = "; ".join(row.in_words for row in rows if slim is not None and row.model == slim.name)
    skipped = tuple(SkippedBackend.of(backend, error) for backend, error in failed.items())
    for each in skipped:
        listener(Warned(each.in_words))
    return Profile({**environment, "peak_memory_mb": peak_memory_mb()}, tuple(rows), skipped)


def _release(error: BaseException) -> None:
    """Let go of the frames of an error, in which networks of a backend that failed would fill the GPU's memory.

    Compilers raise one error from another several times, and frames of any of them hold the network.
    """
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            waiting += [other for other in (each.__cause__, each.__context__) if other is not None]
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _batch_errors(backend: str, images: Tensor, setting: Setting, fitting: Sequence[int]) -> Any:
    """Return a context that reports a batch that does not fit into memory; those in `fitting` did."""
    batch, shape = len(images), " x ".join(map(str, images.shape[1:]))
    half = f"Try half of it: --batch {max(1, batch // 2)}; other" if not fitting else "Other"
    return memory_errors(
        lambda: f"profile in {backend}: a batch of {batch} images of {shape}, dense and slim together,",
        setting.device_of(backend),
        advice=f"{half} programs use memory too.",
        fitted=lambda: max(fitting, default=None),
    )


@runtime_checkable
class _CopiesImages(Protocol):
    """A runner that can copy its batch from the host to the device."""

    def copy(self) -> None:
        """Copy the batch again."""
        ...


@dataclass(frozen=True)
class _Comparison:
    """The arguments that all backends and batch sizes of a profile share."""

    candidates: Sequence[Candidate]
    threads: int
    setting: Setting
    budget: TimeBudget
    seed: int
    clock: Clock | None

    def measure(self, backend: str, images: Tensor) -> list[Row]:
        """Build the networks, measure their latency in turns, then their extra metrics; return a row for each."""
        device = self.setting.device_of(backend)
        with side_stream(device):
            clock = self.clock or clock_of_backend(backend, device)
            builder = _SessionBuilder(self, backend, images)
            times = measure_sessions(builder.build_session, clock, self.budget, sessions=self.session_count(backend))
            notes = find_disturbances(builder.before, MachineCounters.now(device))
            summaries = [summarise_times(*sessions, seed=self.seed) for sessions in times]
            speedups = [None, *(speedup_over_sessions(times[0], sessions) for sessions in times[1:])]
            extras = [
                replace(_measure_extra(runner, summary, clock, notes), memory_mb=memory_mb)
                for runner, summary, memory_mb in zip(builder.runners, summaries, builder.memory_mb, strict=True)
            ]
        return [
            make_row(*parts, batch=len(images), threads=self.threads, options=self.setting.options)
            for parts in zip(builder.runners, summaries, speedups, extras, strict=True)
        ]

    def session_count(self, backend: str) -> int:
        """Return how many times both networks are built anew."""
        if backend in BUILT_ONCE:
            return 1
        return SESSIONS if self.budget.seconds >= FULL_SECONDS else _FEW_SESSIONS


@contextmanager
def _run_errors(backend: str, name: str) -> Iterator[None]:
    """Turn what a backend raises into a RunError; those of backends have no common base class."""
    try:
        yield
    except PassDeployError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RunError(f"{backend} cannot run the {name} network: {first_line(error)}") from error


class _SessionBuilder:
    """Builds the networks of a comparison anew for every session, in the opposite order every other time."""

    def __init__(self, comparison: _Comparison, backend: str, images: Tensor) -> None:
        self.runners: list[Runner] = []
        self.memory_mb: list[float | None] = [None] * len(comparison.candidates)
        self._comparison, self._backend, self._images = comparison, backend, images
        self.before = MachineCounters.now()

    def build_session(self, session: int) -> Sequence[Runner]:
        """Build and prepare the runners of a session; return them in the order of the candidates."""
        device = self._comparison.setting.device_of(self._backend)
        if device.type == "cuda":
            self.runners = []  # a GPU may have no room for two of each; on a CPU, new ones must get other memory
        made: dict[int, Runner] = {}
        order = range(len(self._comparison.candidates))
        for number in order if session % 2 == 0 else reversed(order):

            def build(number: int = number) -> None:
                """Build one runner and run it once."""
                candidate, setting = self._comparison.candidates[number], self._comparison.setting
                images = candidate.inputs(len(self._images)) if candidate.inputs else (self._images,)
                with _run_errors(self._backend, candidate.name):
                    made[number] = make_runner(candidate, self._backend, self._comparison.threads, setting)
                    made[number].prepare(*images)
                    made[number].run()

            memory_mb = measure_gpu_memory(device, build, by_driver=self._backend in ON_GPU)
            if session == 0:
                self.memory_mb[number] = memory_mb
        self.runners = [made[number] for number in order]
        if session == 0:  # not earlier: the compiler's own processes would count as disturbances
            self.before = MachineCounters.now(device)
        return self.runners


def _measure_extra(
    runner: Runner, summary: LatencySummary, clock: Clock, disturbances: tuple[str, ...]
) -> ExtraMetrics:
    """Measure the time to queue a call and to copy the batch, with calls of their own, and collect the notes."""
    queued_ms = [clock.enqueue_ms(runner.run) for _ in range(_EXTRA_CALLS)]
    enqueue_ms = median(ms for ms in queued_ms if ms is not None) if queued_ms[0] is not None else None
    copy_ms = None
    if enqueue_ms is not None and isinstance(runner, _CopiesImages):
        copy_ms = median(clock.time_ms(runner.copy) for _ in range(_EXTRA_CALLS))
    notes = (launch_note(runner, summary.median_ms, enqueue_ms), *disturbances)
    if copy_ms is not None and copy_ms >= summary.median_ms:
        notes = (*notes, "copying the batch to the GPU takes longer than the network")  # trtexec warns of the same
    return ExtraMetrics(enqueue_ms=enqueue_ms, copy_ms=copy_ms, notes=tuple(note for note in notes if note))


def _check_arguments(
    dense: Candidate, slim: Candidate | None, batches: Sequence[int], threads: int, seconds: float
) -> None:
    """Raise UsageError for batches, threads or a time below the minimum, and for two networks with one name."""
    if wrong := [batch for batch in batches if batch < 1]:
        raise UsageError(f"batch {wrong[0]} makes no sense: a batch holds at least one image.")
    if threads < 1 or seconds <= 0:
        raise UsageError(f"{threads} threads for {seconds} s makes no sense: both must be above zero.")
    if slim is not None and dense.name == slim.name:
        raise UsageError(f"both networks are called {slim.name!r}; the table could not tell them apart.")


def _warn_if_busy(environment: Mapping[str, Any], device: torch.device | None, listener: Listener) -> None:
    """Warn if other processes use the CPU or the GPU that is measured on, or it is throttled, before it begins."""
    busy, cores = environment["busy_cores"], environment["cores"]
    if busy is not None and busy > OTHERS_BUSY:
        listener(Warned(f"other processes keep {busy:.1f} of {cores} cores busy: latencies will scatter."))
    if device is None:
        return
    for gpu in environment["gpus"][device.index or 0 :][:1]:
        if reasons := gpu.get("throttled_by"):
            listener(
                Warned(f"{gpu['name']} is throttled ({', '.join(reasons)}): latencies are longer than they need be.")
            )
        if others := gpu.get("other_processes"):
            listener(
                Warned(
                    f"{gpu['name']} is also used by {', '.join(map(process_text, others))}: latencies will scatter and "
                    "be too long, and less memory is left.\nStop it before you rely on these figures."
                )
            )
