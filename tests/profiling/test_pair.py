from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from passdeploy.errors import DeviceMemoryError, MissingError, RunError, UsageError
from passdeploy.export.artifact import describe_artifact
from passdeploy.export.trt_sidecar import write_sidecar
from passdeploy.profiling import Candidate, Setting, pair, profile_pair
from passdeploy.profiling.interleaved import SESSIONS
from passdeploy.profiling.runners import Runner
from passdeploy.runtime import cuda_driver
from passdeploy.runtime.events import Event, Step, Warned

from .fakes import FakeClock, FakeRunner

CONTRACT = {
    *("model", "artifact", "backend", "device", "precision", "batch"),
    *("median_ms", "p90_ms", "p99_ms", "ci95_rel", "images_per_s", "speedup", "speedup_ci", "notes"),
}
EXTRA = {"options", "enqueue_ms", "copy_ms", "memory_mb"}
DENSE, SLIM = Candidate("dense"), Candidate("slim")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(autouse=True)
def nothing_disturbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore disturbances of the real machine, which a fake clock does not measure."""
    monkeypatch.setattr(pair, "find_disturbances", lambda before, after: ())


def runs_take(monkeypatch: pytest.MonkeyPatch, clock: FakeClock, **ms: float | Iterator[float]) -> list[FakeRunner]:
    """Let each candidate take the given milliseconds on every backend; return the list of runners that are made."""
    made: list[FakeRunner] = []

    def runner(candidate: Candidate, backend: str, threads: int, setting: Setting) -> Runner:
        made.append(FakeRunner(candidate.name, clock, ms[candidate.name]))
        return made[-1]

    monkeypatch.setattr(pair, "make_runner", runner)
    return made


def scatter(seed: int) -> Iterator[float]:
    """Yield call times in milliseconds that scatter by 10 %."""
    generator = np.random.default_rng(seed)
    return (float(generator.lognormal(1.0, 0.1)) for _ in repeat(None))


def test_the_rows_keep_the_contract(monkeypatch: pytest.MonkeyPatch, clock: FakeClock):
    runs_take(monkeypatch, clock, dense=6.0, slim=3.0)
    profile = profile_pair(DENSE, SLIM, image_shape=(3, 4, 4), batches=(1, 8), threads=1, clock=clock)
    found = json.loads(json.dumps(profile.to_json()))
    assert set(found["rows"][0]) >= CONTRACT | EXTRA
    assert [(row["model"], row["batch"]) for row in found["rows"]] == 2 * [
        ("dense", 1),
        ("slim", 1),
        ("dense", 8),
        ("slim", 8),
    ]
    dense, slim = found["rows"][2:4]
    assert (dense["speedup"], slim["speedup"]) == (1.0, pytest.approx(2.0))
    assert slim["speedup_ci"] == pytest.approx([2.0, 2.0])
    assert slim["images_per_s"] == pytest.approx(8 / 3e-3)
    assert slim["notes"] == []
    assert (slim["options"], slim["enqueue_ms"], slim["copy_ms"], slim["memory_mb"]) == ([], None, None, None)
    assert found["environment"]["threads"] == 1


def test_the_same_times_are_no_measurable_difference(monkeypatch: pytest.MonkeyPatch, clock: FakeClock):
    runs_take(monkeypatch, clock, dense=scatter(1), slim=scatter(2))
    profile = profile_pair(DENSE, SLIM, image_shape=(3, 4, 4), backends=["ort"], batches=[1], threads=1, clock=clock)
    slim = profile.rows[1]
    assert slim.notes[0] == "no measurable difference"


def test_scatter_is_reported_as_unstable(monkeypatch: pytest.MonkeyPatch, clock: FakeClock):
    generator = np.random.default_rng(0)
    wild = (float(ms) for ms in generator.lognormal(3.0, 1.5, 10**6))
    runs_take(monkeypatch, clock, dense=wild, slim=1.0)
    rows = profile_pair(
        DENSE, SLIM, image_shape=(3, 4, 4), backends=["ort"], batches=[1], threads=1, seconds=1, clock=clock
    ).rows
    assert "unstable" in rows[0].notes[0]
    assert rows[1].notes == ()


def test_what_happened_meanwhile_stands_in_both_rows(monkeypatch: pytest.MonkeyPatch, clock: FakeClock):
    runs_take(monkeypatch, clock, dense=2.0, slim=1.0)
    monkeypatch.setattr(pair, "find_disturbances", lambda before, after: ("throttled: too hot",))
    rows = profile_pair(
        DENSE, SLIM, image_shape=(3, 4, 4), backends=["ort"], batches=[1], threads=1, seconds=1, clock=clock
    ).rows
    assert [row.notes for row in rows] == [("throttled: too hot",)] * 2


class Queueing(FakeClock):
    """The clock of a device, on which the host takes `queued` milliseconds to queue a call of any length."""

    def __init__(self, queued: float) -> None:
        super().__init__()
        self.queued = queued

    def enqueue_ms(self, work: Callable[[], object]) -> float:
        work()
        return self.queued


class Copying(FakeRunner):
    """A network whose batch takes 5 ms to copy."""

    def copy(self) -> None:
        self._clock.seconds += 5e-3


def test_on_a_device_queueing_and_copying_are_measured_apart(monkeypatch: pytest.MonkeyPatch):
    clock = Queueing(1.9)
    made = {name: Copying(name, clock, ms) for name, ms in (("dense", 8.0), ("slim", 2.0))}
    monkeypatch.setattr(pair, "make_runner", lambda candidate, *_: made[candidate.name])
    dense, slim = profile_pair(
        DENSE, SLIM, image_shape=(3, 4, 4), backends=["torch"], batches=[1], threads=1, seconds=1, clock=clock
    ).rows
    assert (dense.median_ms, dense.enqueue_ms, dense.copy_ms) == (pytest.approx(8), 1.9, pytest.approx(5))
    assert dense.notes == ()
    assert slim.median_ms == pytest.approx(2)  # copies are no part of it
    assert slim.notes[0].startswith("launch-bound: the host takes 1.9 ms to queue a call")
    assert slim.notes[1] == "copying the batch to the GPU takes longer than the network"


def test_both_networks_see_the_same_images_of_the_asked_batch(monkeypatch: pytest.MonkeyPatch, clock: FakeClock):
    made = runs_take(monkeypatch, clock, dense=2.0, slim=1.0)
    profile_pair(DENSE, SLIM, image_shape=(3, 4, 6), backends=["ort"], batches=[5], threads=1, clock=clock)
    assert made[0].images.shape == (5, 3, 4, 6)
    assert all(torch.equal(runner.images, made[0].images) for runner in made)


def test_both_are_built_anew_for_every_session_and_neither_is_always_first(
    monkeypatch: pytest.MonkeyPatch, clock: FakeClock
):
    made = runs_take(monkeypatch, clock, dense=2.0, slim=1.0)
    profile_pair(DENSE, SLIM, image_shape=(3, 4, 6), backends=["ort"], batches=[1], threads=1, clock=clock)
    assert [runner.name for runner in made] == ["dense", "slim", "slim", "dense"] * (SESSIONS // 2)
    made.clear()
    profile_pair(DENSE, SLIM, image_shape=(3, 4, 6), backends=["compile"], batches=[1], threads=1, clock=clock)
    assert [runner.name for runner in made] == ["dense", "slim"]  # compiling takes longer than measuring


def test_what_one_session_has_on_another_is_no_speedup(monkeypatch: pytest.MonkeyPatch, clock: FakeClock):
    """Every session of a network is up to 3 % slower than another, for as long as it lasts."""
    chance = np.random.default_rng(3)

    def runner(candidate: Candidate, *_: object) -> Runner:
        return FakeRunner(candidate.name, clock, float(2.0 * (1 + 0.03 * chance.random())))

    monkeypatch.setattr(pair, "make_runner", runner)
    profile = profile_pair(
        DENSE, SLIM, image_shape=(3, 4, 4), backends=["ort"], batches=range(1, 13), threads=1, clock=clock
    )
    assert sum(row.notes[:1] == ("no measurable difference",) for row in profile.rows[1::2]) >= 11


def test_progress_is_told_per_comparison(monkeypatch: pytest.MonkeyPatch, clock: FakeClock):
    events: list[Event] = []
    runs_take(monkeypatch, clock, dense=2.0, slim=1.0)
    profile_pair(DENSE, SLIM, image_shape=(3, 4, 4), batches=[1, 2], threads=1, clock=clock, listener=events.append)
    assert [(event.done, event.total) for event in events if isinstance(event, Step)] == [
        (1, 4),
        (2, 4),
        (3, 4),
        (4, 4),
    ]


def test_pytorch_really_runs_and_its_threads_are_restored():
    before = torch.get_num_threads()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    profile = profile_pair(
        Candidate("dense", net, weights="dense.safetensors"),
        Candidate("slim", net),
        image_shape=(3, 8, 8),
        backends=["torch"],
        batches=[1],
        threads=before,
        seconds=0.2,
    )
    assert [row.artifact for row in profile.rows] == ["dense.safetensors", "Sequential"]
    assert all(row.median_ms > 0 and row.n >= 8 for row in profile.rows)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"backends": ["onnx"]}, "unknown backend onnx: choose from torch, compile, ort"),
        ({"batches": [8, 0]}, "batch 0 makes no sense"),
        ({"threads": 0}, "0 threads"),
        ({"backends": ["ort"]}, "the dense network has no ONNX file to run in ort"),
        ({"backends": ["torch"]}, "the dense network has no module to run in torch"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, object], words: str):
    with pytest.raises(UsageError, match=words):
        profile_pair(DENSE, SLIM, image_shape=(3, 4, 4), **wrong)  # type: ignore[arg-type]


def test_an_engine_without_a_gpu_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_driver, "probe_driver", lambda: None)
    path = tmp_path / "model.engine"
    path.write_bytes(b"a plan")
    write_sidecar(describe_artifact(path, kind="engine", precision="fp32", facts={}))
    with pytest.raises(MissingError, match="no NVIDIA driver here"):
        profile_pair(Candidate("dense", engine=path), None, image_shape=(3, 4, 4), backends=["tensorrt"])


def test_a_missing_file_names_the_command(tmp_path: Path):
    pytest.importorskip("onnxruntime", reason="extra cpu is not installed")
    dense = Candidate("dense", onnx=tmp_path / "dense.onnx")
    with pytest.raises(UsageError, match=r"no ONNX file .*dense\.onnx"):
        profile_pair(dense, SLIM, image_shape=(3, 4, 4), backends=["ort"])


def refusing(monkeypatch: pytest.MonkeyPatch, clock: FakeClock, errors: dict[str, Exception]) -> None:
    """Let every network take a millisecond, except on the backends with an error, which is raised."""

    def runner(candidate: Candidate, backend: str, threads: int, setting: Setting) -> Runner:
        if backend in errors:
            raise errors[backend]
        return FakeRunner(candidate.name, clock, 1.0)

    monkeypatch.setattr(pair, "make_runner", runner)


def test_a_backend_that_was_not_named_and_does_not_start_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, clock: FakeClock
):
    events: list[Event] = []
    refusing(monkeypatch, clock, {"compile": MissingError("there is no Triton.\nInstall it.")})

    def profile(optional: tuple[str, ...]) -> pair.Profile:
        return profile_pair(
            *(DENSE, SLIM),
            image_shape=(3, 4, 4),
            backends=("torch", "compile"),
            optional=optional,
            threads=1,
            clock=clock,
            listener=events.append,
        )

    document = profile(("torch", "compile")).to_json()
    assert {row["backend"] for row in document["rows"]} == {"fake"}
    assert [(row["model"], row["batch"]) for row in document["rows"]] == [
        *(("dense", 1), ("slim", 1)),
        *(("dense", 8), ("slim", 8)),
    ]
    assert document["skipped"] == [{"backend": "compile", "reason": "there is no Triton. Install it."}]
    assert Warned("compile is left out: there is no Triton. Install it.") in events
    with pytest.raises(MissingError, match="no Triton"):
        profile(("torch",))  # compile was named


@pytest.mark.parametrize("depth", [0, 3])
def test_a_backend_that_fails_while_it_runs_is_left_out_and_lets_go_of_its_networks(
    depth: int, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
):
    alive: list[weakref.ref[Runner]] = []
    left: list[int] = []

    class Failing(FakeRunner):
        def run(self, left: int = depth) -> None:
            """Fail, as a compiler does: with an error from an error, whose frames hold this runner too."""
            message = "CUDA error: no kernel image is available for execution on the device"
            if left == 0:
                raise RuntimeError(message)
            try:
                self.run(left - 1)
            except RuntimeError as error:
                raise RuntimeError(message) from error

    def runner(candidate: Candidate, backend: str, threads: int, setting: Setting) -> Runner:
        if backend == "torch":
            made = Failing(candidate.name, clock, 1.0)
            alive.append(weakref.ref(made))
            return made
        left.append(sum(each() is not None for each in alive))
        return FakeRunner(candidate.name, clock, 1.0)

    monkeypatch.setattr(pair, "make_runner", runner)
    names = ("torch", "ort")
    arguments = {"image_shape": (3, 4, 4), "backends": names, "threads": 1, "clock": clock}
    profile = profile_pair(DENSE, SLIM, optional=names, **arguments)  # type: ignore[arg-type]
    ((backend, reason),) = ((each.backend, each.reason) for each in profile.skipped)
    assert backend == "torch"
    assert reason.startswith("torch cannot run the dense network: CUDA error: no kernel image")
    assert len(alive) == 1
    assert not any(left)
    with pytest.raises(RunError, match="torch cannot run the dense network"):
        profile_pair(DENSE, SLIM, **arguments)  # type: ignore[arg-type]


def test_where_no_backend_starts_the_first_error_is_raised(monkeypatch: pytest.MonkeyPatch, clock: FakeClock):
    both = ("torch", "ort")
    refusing(monkeypatch, clock, {name: MissingError(f"no {name} here") for name in both})
    with pytest.raises(MissingError, match="no torch here"):
        profile_pair(DENSE, SLIM, image_shape=(3, 4, 4), backends=both, optional=both, threads=1, clock=clock)


def test_a_batch_that_does_not_fit_is_named_with_one_that_did(monkeypatch: pytest.MonkeyPatch, clock: FakeClock):
    class Large(FakeRunner):
        backend = "torch"

        def prepare(self, images: torch.Tensor, *others: torch.Tensor) -> None:
            if len(images) > 8:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90.00 GiB.")

    monkeypatch.setattr(pair, "make_runner", lambda candidate, *_: Large(candidate.name, clock, 1.0))
    arguments = {"image_shape": (3, 4, 4), "backends": ["torch"], "threads": 1, "seconds": 0.5, "clock": clock}
    words = r"profile in torch: a batch of 32 images of 3 x 4 x 4, .*\nThe largest batch that did fit: 8"
    with pytest.raises(DeviceMemoryError, match=words):
        profile_pair(DENSE, SLIM, batches=(1, 8, 32), **arguments)  # type: ignore[arg-type]
    with pytest.raises(DeviceMemoryError, match=r"\nNo smaller batch was tried. Try half of it: --batch 16"):
        profile_pair(DENSE, SLIM, batches=(32,), **arguments)  # type: ignore[arg-type]


def test_others_on_the_gpu_that_is_measured_are_named_before_it_begins():
    others = [{"pid": 71, "name": "/usr/bin/python", "memory_mb": 2048}]
    environment = {
        "busy_cores": 0.0,
        "cores": 2,
        "gpus": [{"name": "Small GPU", "other_processes": others}, {"name": "Large GPU", "other_processes": others}],
    }
    events: list[Event] = []
    pair._warn_if_busy(environment, None, events.append)
    assert not events  # measured on the CPU
    pair._warn_if_busy(environment, torch.device("cuda:1"), events.append)
    (warning,) = events
    assert isinstance(warning, Warned)
    assert warning.text.startswith("Large GPU is also used by python (process 71, 2,048 MiB): latencies will scatter")
