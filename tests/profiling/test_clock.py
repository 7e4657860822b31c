from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from passdeploy.profiling.clock import CudaClock, HostClock, clock_for


class Device:
    """A CUDA stream whose work takes 5 ms of device time, with a log of the calls."""

    def __init__(self) -> None:
        self.log, self.ms = list[str](), 0.0

    def synchronize(self) -> None:
        self.log.append("wait")

    def work(self) -> None:
        self.log.append("work")
        self.ms += 5.0


class Event:
    """A CUDA event: it records the device time of its stream."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self, stream: Device) -> None:
        stream.log.append("event")
        self.at, self.stream = stream.ms, stream

    def synchronize(self) -> None:
        self.stream.synchronize()

    def elapsed_time(self, later: Event) -> float:
        return later.at - self.at


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(current_stream=lambda device: made, Event=Event))
    return made


def test_work_on_a_device_is_timed_between_two_events(device: Device):
    clock: Any = clock_for(torch.device("cuda"))
    assert isinstance(clock, CudaClock)
    assert clock.time_ms(device.work) == 5.0
    assert device.log == ["event", "work", "event", "wait"]


def test_events_are_recorded_where_the_work_is_queued_not_where_the_clock_was_made(
    device: Device, monkeypatch: pytest.MonkeyPatch
):
    clock, side = CudaClock(torch.device("cuda")), Device()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None, raising=False)
    assert clock.time_ms(side.work) == 5.0
    clock.delay_device(1.0)
    assert clock.time_step(side.work)() == 5.0
    assert device.log == []


def test_steps_of_a_call_are_told_apart_without_waiting_for_any(device: Device, monkeypatch: pytest.MonkeyPatch):
    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append, raising=False)
    clock = CudaClock(torch.device("cuda"))
    clock.delay_device(2.0)
    spans = [clock.time_step(device.work) for _ in range(2)]
    assert slept == [4_000_000]
    assert device.log == ["event", "work", "event", "work", "event"]  # one event between two steps, and no wait
    assert [took() for took in spans] == [5.0, 5.0]
    assert device.log[5:] == ["wait", "wait"]


def test_queueing_is_timed_on_the_host_and_the_device_is_waited_for_afterwards(device: Device):
    queued = CudaClock(torch.device("cuda")).enqueue_ms(device.work)
    assert queued is not None
    assert 0 < queued < 5.0  # the host does not wait for the 5 ms
    assert device.log == ["work", "wait"]


def test_on_the_host_nothing_is_queued():
    assert clock_for(torch.device("cpu")).enqueue_ms(lambda: None) is None
    assert isinstance(clock_for(torch.device("cpu")), HostClock)
