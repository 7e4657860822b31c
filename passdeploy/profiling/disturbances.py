"""What disturbed a measurement while it was made: told from what the machine counts, read before and after.

Nothing is changed, and what cannot be read disturbs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, process_time
from typing import Any

from passdeploy.profiling.environment import busy_ticks
from passdeploy.profiling.nvml import read_gpus

OTHERS_BUSY = 0.3  # cores that other processes may use without being mentioned
_LONG_ENOUGH_S = 0.5  # ticks are hundredths of a second: over less they say little
_CLOCK_FELL = 0.95  # of what it was before
_CPU_STAT = Path("/sys/fs/cgroup/cpu.stat")
_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class MachineCounters:
    """The counters of the machine at one moment."""

    at: float  # seconds
    busy: int | None  # clock ticks that all cores have worked
    own: float  # seconds that this process has worked
    stopped: int | None  # times that the container's quota has stopped us
    too_hot: int | None  # times that a core has slowed itself down
    gpus: tuple[dict[str, Any], ...] = ()

    @classmethod
    def now(cls, *, with_gpus: bool = False) -> MachineCounters:
        """Read them."""
        gpus = tuple(read_gpus()) if with_gpus else ()
        return cls(monotonic(), busy_ticks(), process_time(), _stopped(), _too_hot(), gpus)


def disturbances(before: MachineCounters, after: MachineCounters) -> tuple[str, ...]:
    """What happened in between, as notes of a row; none where it was quiet."""
    found = []
    elapsed = after.at - before.at
    if before.busy is not None and after.busy is not None and elapsed > _LONG_ENOUGH_S:
        others = (after.busy - before.busy) / os.sysconf("SC_CLK_TCK") - (after.own - before.own)
        if others / elapsed > OTHERS_BUSY:
            found.append(f"disturbed: other processes kept {others / elapsed:.1f} cores busy")
    if before.stopped is not None and after.stopped is not None and after.stopped > before.stopped:
        found.append(f"throttled: the container's CPU quota stopped us {after.stopped - before.stopped} times")
    if before.too_hot is not None and after.too_hot is not None and after.too_hot > before.too_hot:
        found.append(f"throttled: cores were too hot {after.too_hot - before.too_hot} times")
    for first, then in zip(before.gpus, after.gpus, strict=False):
        found += _of_gpu(first, then)
    return tuple(found)


def _of_gpu(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    found, name = [], after["name"]
    if reasons := sorted({*(before.get("throttled_by") or ()), *(after.get("throttled_by") or ())}):
        found.append(f"throttled: {name} by {', '.join(reasons)}")
    clocks = before.get("sm_clock_mhz"), after.get("sm_clock_mhz")
    if clocks[0] and clocks[1] and clocks[1] < _CLOCK_FELL * clocks[0]:
        found.append(f"throttled: the clock of {name} fell from {clocks[0]} to {clocks[1]} MHz")
    if (after.get("processes") or 0) > 1:
        found.append(f"disturbed: {after['processes'] - 1} other processes on {name}")
    return found


def _stopped() -> int | None:
    for line in _lines(_CPU_STAT):
        if line.startswith("nr_throttled "):
            return int(line.split()[1])
    return None


def _too_hot() -> int | None:
    counters: Sequence[Path] = sorted(_CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
    values = [int(line) for path in counters for line in _lines(path)[:1]]
    return sum(values) if values else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
