from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from passdeploy.profiling import disturbances
from passdeploy.profiling.disturbances import MachineCounters, find_disturbances

TICKS = os.sysconf("SC_CLK_TCK")
BEFORE = MachineCounters(at_s=10.0, busy_ticks=1000, own_cpu_s=5.0, quota_stops=3, heat_throttles=0)
OTHERS = [{"pid": 71, "name": "/usr/bin/python", "memory_mb": 2048}]
GPU: dict[str, Any] = {"name": "Imaginary GPU", "throttled_by": [], "sm_clock_mhz": 1980, "other_processes": []}


@pytest.fixture(autouse=True)
def no_quota(monkeypatch: pytest.MonkeyPatch):
    """Let this process use all CPUs that it may run on, whatever container the tests run in."""
    monkeypatch.setattr(disturbances, "cpus_beyond_quota", lambda: 0.0)


def after(**changed: Any) -> MachineCounters:
    """Return the counters two seconds later, in which this process alone kept one core busy."""
    return replace(BEFORE, **{"at_s": 12.0, "busy_ticks": 1000 + 2 * TICKS, "own_cpu_s": 7.0, **changed})


def test_what_this_process_does_disturbs_nothing():
    assert find_disturbances(BEFORE, after()) == ()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"busy_ticks": 1000 + 4 * TICKS}, "disturbed: other processes kept 1.0 cores busy"),
        ({"quota_stops": 7}, "throttled: the container's CPU quota stopped us 4 times"),
        ({"heat_throttles": 2}, "throttled: cores were too hot 2 times"),
    ],
)
def test_what_happened_in_between_is_said(changed: dict[str, int], words: str):
    assert find_disturbances(BEFORE, after(**changed)) == (words,)


@pytest.mark.parametrize(("beyond", "is_disturbed"), [(6.0, False), (1.0, False), (0.5, True)])
def test_cpus_beyond_the_quota_of_a_container_may_be_busy(
    beyond: float, is_disturbed: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(disturbances, "cpus_beyond_quota", lambda: beyond)
    assert bool(find_disturbances(BEFORE, after(busy_ticks=1000 + 4 * TICKS))) == is_disturbed


def test_a_moment_is_too_short_to_tell():
    assert find_disturbances(BEFORE, after(at_s=10.1, busy_ticks=1000 + TICKS, own_cpu_s=5.0)) == ()


def test_what_cannot_be_read_disturbs_nothing():
    unknown = {"busy_ticks": None, "quota_stops": None, "heat_throttles": None}
    assert find_disturbances(replace(BEFORE, **unknown), after(**unknown)) == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ()),
        ({"throttled_by": ["SwPowerCap"]}, ("throttled: Imaginary GPU by SwPowerCap",)),
        ({"sm_clock_mhz": 1500}, ("throttled: the clock of Imaginary GPU fell from 1980 to 1500 MHz",)),
        (
            {"sm_clock_mhz": 1950, "other_processes": OTHERS},
            ("disturbed: python (process 71, 2,048 MiB) on Imaginary GPU",),
        ),
        ({"sm_clock_mhz": None, "other_processes": None, "throttled_by": None}, ()),
    ],
)
def test_gpus_are_compared_with_what_they_were(changed: dict[str, Any], words: tuple[str, ...]):
    assert find_disturbances(replace(BEFORE, gpu=GPU), after(gpu={**GPU, **changed})) == words


def test_what_others_do_on_another_gpu_disturbs_nothing(monkeypatch: pytest.MonkeyPatch):
    busy, idle = {**GPU, "other_processes": OTHERS}, {**GPU, "name": "GPU 1"}
    monkeypatch.setattr(disturbances, "read_gpus", lambda: [busy, idle])

    def notes(device: str) -> tuple[str, ...]:
        gpu = MachineCounters.now(torch.device(device)).gpu
        return find_disturbances(replace(BEFORE, gpu=gpu), after(gpu=gpu))

    assert notes("cuda:1") == notes("cpu") == ()
    assert notes("cuda") == notes("cuda:0") == ("disturbed: python (process 71, 2,048 MiB) on Imaginary GPU",)
    assert notes("cuda:7") == ()  # there is no such GPU


def test_counters_are_read_where_the_system_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("passdeploy.profiling.disturbances._CPU_STAT", tmp_path / "cpu.stat")
    monkeypatch.setattr("passdeploy.profiling.disturbances._CPUS", tmp_path)
    counters = MachineCounters.now()
    assert (counters.quota_stops, counters.heat_throttles) == (None, None)
    (tmp_path / "cpu.stat").write_text("nr_periods 10\nnr_throttled 4\n")
    for cpu in range(2):
        (tmp_path / f"cpu{cpu}" / "thermal_throttle").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "thermal_throttle" / "core_throttle_count").write_text(f"{cpu + 1}\n")
    counters = MachineCounters.now()
    assert (counters.quota_stops, counters.heat_throttles) == (4, 3)
    assert counters.own_cpu_s > 0
