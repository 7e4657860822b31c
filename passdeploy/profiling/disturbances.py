"""Disturbances of a measurement: busy processes and throttling, from counters of the machine read before and after it.

Counters are only read, never changed; one that cannot be read is ignored.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, process_time
from typing import Any

import torch

from passdeploy.profiling.environment import busy_ticks, cpus_beyond_quota
from passdeploy.profiling.nvml import process_text, read_gpus

OTHERS_BUSY = 0.3  # cores; other processes that use less are not reported
_SHORTEST_S = 0.5  # clock ticks are hundredths of a second, too coarse for a shorter measurement
_LOWEST_CLOCK_SHARE = 0.95  # of the GPU clock before; below this it is reported as throttled
_CPU_STAT = Path("/sys/fs/cgroup/cpu.stat")
_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class MachineCounters:
    """The counters of the machine at one moment."""

    at_s: float  # monotonic clock
    busy_ticks: int | None  # clock ticks that the CPUs which this process may run on have worked
    own_cpu_s: float  # CPU seconds of this process
    quota_stops: int | None  # times that the container's CPU quota has stopped this process
    heat_throttles: int | None  # times that a core has slowed itself down
    gpu: dict[str, Any] | None = None  # that is measured on, see `read_gpus`; None on a CPU

    @classmethod
    def now(cls, device: torch.device | None = None) -> MachineCounters:
        """Read the counters of the machine, and of the GPU that is `device`; other GPUs disturb nothing."""
        gpu = _read_gpu(device) if device is not None and device.type == "cuda" else None
        return cls(monotonic(), busy_ticks(), process_time(), _quota_stops(), _heat_throttles(), gpu)


def find_disturbances(before: MachineCounters, after: MachineCounters) -> tuple[str, ...]:
    """Compare the counters before and after a measurement; return the notes for its row, none if nothing happened."""
    notes = []
    elapsed_s = after.at_s - before.at_s
    if before.busy_ticks is not None and after.busy_ticks is not None and elapsed_s > _SHORTEST_S:
        all_cpu_s = (after.busy_ticks - before.busy_ticks) / os.sysconf("SC_CLK_TCK")
        others = (all_cpu_s - (after.own_cpu_s - before.own_cpu_s)) / elapsed_s - cpus_beyond_quota()
        if others > OTHERS_BUSY:
            notes.append(f"disturbed: other processes kept {others:.1f} cores busy")
    if stops := _increase(before.quota_stops, after.quota_stops):
        notes.append(f"throttled: the container's CPU quota stopped us {stops} times")
    if throttles := _increase(before.heat_throttles, after.heat_throttles):
        notes.append(f"throttled: cores were too hot {throttles} times")
    if before.gpu is not None and after.gpu is not None:
        notes += _gpu_disturbances(before.gpu, after.gpu)
    return tuple(notes)


def _increase(before: int | None, after: int | None) -> int:
    """Return by how much a counter has grown; 0 where it cannot be read."""
    return 0 if before is None or after is None else max(after - before, 0)


def _read_gpu(device: torch.device) -> dict[str, Any] | None:
    """Read the state of one GPU; None where the driver does not list it."""
    return next(iter(read_gpus()[device.index or 0 :]), None)


def _gpu_disturbances(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Compare the state of one GPU before and after; see `read_gpus` for its keys."""
    notes, name = [], after["name"]
    if reasons := sorted({*(before.get("throttled_by") or ()), *(after.get("throttled_by") or ())}):
        notes.append(f"throttled: {name} by {', '.join(reasons)}")
    clocks = before.get("sm_clock_mhz"), after.get("sm_clock_mhz")
    if clocks[0] and clocks[1] and clocks[1] < _LOWEST_CLOCK_SHARE * clocks[0]:
        notes.append(f"throttled: the clock of {name} fell from {clocks[0]} to {clocks[1]} MHz")
    if others := after.get("other_processes"):
        notes.append(f"disturbed: {', '.join(map(process_text, others))} on {name}")
    return notes


def _quota_stops() -> int | None:
    """Read how often the container's CPU quota has stopped its processes; None where there is no such counter."""
    for line in _counter_lines(_CPU_STAT):
        if line.startswith("nr_throttled "):
            return int(line.split()[1])
    return None


def _heat_throttles() -> int | None:
    """Read how often the cores have slowed down because of heat; None where there are no such counters."""
    counters: Sequence[Path] = sorted(_CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
    values = [int(line) for path in counters for line in _counter_lines(path)[:1]]
    return sum(values) if values else None


def _counter_lines(path: Path) -> list[str]:
    """Read the lines of a file; none if it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
