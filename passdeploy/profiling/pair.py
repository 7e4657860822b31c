"""Dense against slim on this machine: which runs, in what order, and the table that comes out.

Every backend and batch size is one comparison of the two networks, measured in turns and in several sittings. A
speed-up is only claimed with an interval that leaves 1 out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from passdeploy.errors import UsageError
from passdeploy.profiling.candidates import Candidate, runner_of
from passdeploy.profiling.clock import Clock, HostClock, clock_for
from passdeploy.profiling.cuda import memory_of, stream_of
from passdeploy.profiling.disturbances import OTHERS_BUSY, MachineCounters, disturbances
from passdeploy.profiling.environment import peak_memory_mb, physical_cores, read_environment
from passdeploy.profiling.execution import ON_GPU, Setting
from passdeploy.profiling.interleaved import BUILT_ONCE, SESSIONS, TimeBudget, measure_sessions
from passdeploy.profiling.launch_overhead import launch_note
from passdeploy.profiling.report import ExtraMetrics, Profile, Row, row_of
from passdeploy.profiling.runners import PROVIDERS, Runner, torch_threads
from passdeploy.profiling.statistics import Summary, speedup_over, summarise_times
from passdeploy.runtime.events import Listener, Warned, silent, stage

FULL_SECONDS, FULL_ITERATIONS = 3.0, 1000  # what trtexec's method and a p99 ask for at least
_FEW_SESSIONS = 4  # for a quick look
_APART = 20  # calls, of what is measured beside the latency


def profile_pair(
    dense: Candidate,
    slim: Candidate | None,
    *,
    image_shape: tuple[int, ...],
    backends: Sequence[str] = ("torch", "ort"),
    batches: Sequence[int] = (1, 8),
    threads: int | None = None,
    setting: Setting | None = None,
    seconds: float = 4.0,
    iterations: int | None = None,
    seed: int = 0,
    clock: Clock | None = None,
    tell: Listener = silent,
) -> Profile:
    """Measure both networks; a dense row and a slim row per backend and batch size.

    Args:
        dense: what the speed-up is relative to.
        slim: the network that should be faster; None: `dense` is measured by itself.
        image_shape: (3, height, width).
        backends: of "torch", "compile" (torch.compile), "ort" (ONNX Runtime on the CPU), "ort-cuda" and "ort-trt" (its
            CUDA and TensorRT providers), "tensorrt" (engines), "torch-trt" (programs of Torch-TensorRT).
        batches: images per call.
        threads: of PyTorch and of ONNX Runtime; None takes every physical core of this process.
        setting: device, precision, layout, CUDA graph; None: PyTorch in fp32 on the CPU.
        seconds: at least this long per comparison, both networks together, warm-up apart.
        iterations: at least this many calls of each network, but no more than a minute of them; None: 1,000, or none
            for a quick look of less than 3 seconds.
        seed: of the input images and of the bootstrap.
        clock: another source of time, for tests.
        tell: hears what happens.

    Raises:
        UsageError: an unknown backend, a batch or a thread count below 1, a form that a subject lacks, an option that a
            backend does not have, a batch that a file does not take.
        MissingError, CorruptArtifact, ExportError: see `runner_of`.
    """
    threads, setting = physical_cores() if threads is None else threads, setting or Setting()
    _check(dense, slim, batches, threads, seconds)
    setting.require_possible(backends)
    environment = read_environment(threads=threads)
    _warn_if_busy(environment, tell)
    if iterations is None:
        iterations = FULL_ITERATIONS if seconds >= FULL_SECONDS else 0
    candidates = [candidate for candidate in (dense, slim) if candidate is not None]
    comparison = _Comparison(
        candidates, threads, setting, TimeBudget(seconds=seconds, iterations=iterations), seed, clock
    )
    work = [(backend, batch) for backend in backends for batch in batches]
    rows: list[Row] = []
    names = " and ".join(candidate.name for candidate in candidates)
    words = f"{names} in {', '.join(backends)}, {threads} thread{'s' if threads > 1 else ''}"
    with stage("profile", words, tell, total=len(work)) as progress, torch_threads(threads):
        for done, (backend, batch) in enumerate(work, start=1):
            images = torch.randn(batch, *image_shape, generator=torch.Generator().manual_seed(seed))
            found = comparison.measured(backend, images)
            rows += found
            figure = {"ms": found[0].median_ms} if slim is None else {"speedup": found[1].speedup}
            progress.step(done, len(work), **figure)
        progress.text = "; ".join(row.in_words for row in rows if slim is not None and row.model == slim.name)
    return Profile({**environment, "peak_memory_mb": peak_memory_mb()}, tuple(rows))


@runtime_checkable
class _Copies(Protocol):
    """A runner whose batch comes from the host."""

    def copy(self) -> None: ...


@dataclass(frozen=True)
class _Comparison:
    """Everything that all backends and batches of a profile share."""

    candidates: Sequence[Candidate]
    threads: int
    setting: Setting
    budget: TimeBudget
    seed: int
    clock: Clock | None

    def measured(self, backend: str, images: Tensor) -> list[Row]:
        """Build the networks, measure them in turns, and what else is asked of each; a row each."""
        device = self.setting.device_of(backend)
        with stream_of(device):
            clock = self.clock or _clock_of(backend, device)
            built = _Built(self, backend, images)
            samples = measure_sessions(built.anew, clock, self.budget, sessions=self.sessions_of(backend))
            happened = disturbances(built.before, MachineCounters.now(with_gpus=device.type == "cuda"))
            found = [summarise_times(*taken, seed=self.seed) for taken in samples]
            gained = [None, *(speedup_over(samples[0], taken) for taken in samples[1:])]
            beside = [
                replace(_apart(runner, summary, clock, happened), memory_mb=memory)
                for runner, summary, memory in zip(built.runners, found, built.memory, strict=True)
            ]
        return [
            row_of(*parts, batch=len(images), threads=self.threads, options=self.setting.options)
            for parts in zip(built.runners, found, gained, beside, strict=True)
        ]

    def sessions_of(self, backend: str) -> int:
        """How often both networks are built anew."""
        if backend in BUILT_ONCE:
            return 1
        return SESSIONS if self.budget.seconds >= FULL_SECONDS else _FEW_SESSIONS


class _Built:
    """The networks of a comparison, built anew for every sitting, each of them first every other time."""

    def __init__(self, comparison: _Comparison, backend: str, images: Tensor) -> None:
        self.runners: list[Runner] = []
        self.memory: list[float | None] = [None] * len(comparison.candidates)
        self._comparison, self._backend, self._images = comparison, backend, images
        self.before = MachineCounters.now()

    def anew(self, session: int) -> Sequence[Runner]:
        """Runners in the order of the subjects, whatever order they are built in."""
        device = self._comparison.setting.device_of(self._backend)
        if device.type == "cuda":
            self.runners = []  # a GPU may not have room for two of each; a CPU should not give the same memory again
        made: dict[int, Runner] = {}
        order = range(len(self._comparison.candidates))
        for number in order if session % 2 == 0 else reversed(order):

            def build(number: int = number) -> None:
                candidate, setting = self._comparison.candidates[number], self._comparison.setting
                made[number] = runner_of(candidate, self._backend, self._comparison.threads, setting)
                made[number].prepare(self._images)
                made[number].run()

            taken = memory_of(device, build, by_driver=self._backend in ON_GPU)
            if session == 0:
                self.memory[number] = taken
        self.runners = [made[number] for number in order]
        if session == 0:  # a compiler works in processes of its own, which disturb nobody
            self.before = MachineCounters.now(with_gpus=device.type == "cuda")
        return self.runners


def _clock_of(backend: str, device: torch.device) -> Clock:
    """Events where work is queued. ONNX Runtime's call is over when it returns, on a GPU too: see `OrtRunner.run`.

    Where PyTorch sees no GPU, building the runner says so.
    """
    return HostClock() if backend in PROVIDERS or not torch.cuda.is_available() else clock_for(device)


def _apart(runner: Runner, found: Summary, clock: Clock, happened: tuple[str, ...]) -> ExtraMetrics:
    """What is measured after the latency, by calls of its own."""
    queued = [clock.enqueue_ms(runner.run) for _ in range(_APART)]
    enqueue = median(ms for ms in queued if ms is not None) if queued[0] is not None else None
    copied = None
    if enqueue is not None and isinstance(runner, _Copies):
        copied = median(clock.time_ms(runner.copy) for _ in range(_APART))
    notes = (launch_note(runner, found.median_ms, enqueue), *happened)
    if copied is not None and copied >= found.median_ms:
        notes = (*notes, "copying the batch to the GPU takes longer than the network")  # trtexec's warning
    return ExtraMetrics(enqueue_ms=enqueue, copy_ms=copied, notes=tuple(note for note in notes if note))


def _check(dense: Candidate, slim: Candidate | None, batches: Sequence[int], threads: int, seconds: float) -> None:
    if wrong := [batch for batch in batches if batch < 1]:
        raise UsageError(f"batch {wrong[0]} makes no sense: a batch holds at least one image.")
    if threads < 1 or seconds <= 0:
        raise UsageError(f"{threads} threads for {seconds} s makes no sense: both must be above zero.")
    if slim is not None and dense.name == slim.name:
        raise UsageError(f"both networks are called {slim.name!r}; the table could not tell them apart.")


def _warn_if_busy(environment: Mapping[str, Any], tell: Listener) -> None:
    busy, cores = environment["busy_cores"], environment["cores"]
    if busy is not None and busy > OTHERS_BUSY:
        tell(Warned(f"other processes keep {busy:.1f} of {cores} cores busy: latencies will scatter."))
    for gpu in environment["gpus"]:
        if reasons := gpu.get("throttled_by"):
            tell(Warned(f"{gpu['name']} is throttled ({', '.join(reasons)}): latencies are longer than they need be."))
