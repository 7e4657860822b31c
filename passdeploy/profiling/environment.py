"""The environment of a measurement: CPU, cores, GPUs, system settings and package versions, read and never changed.

A value that cannot be read is None, never a guess.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import import_module
from pathlib import Path
from time import sleep
from typing import Any

from passdeploy.profiling.nvml import read_gpus
from passdeploy.runtime.versions import package_versions

_CPUINFO = Path("/proc/cpuinfo")
_STAT = Path("/proc/stat")
_BOARD = Path("/proc/device-tree/model")  # ends in a zero byte
_APPLE_NAME = ("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's share: "200000 100000" is two cores


def read_environment(*, threads: int) -> dict[str, Any]:
    """Read everything about this machine that a latency depends on and that needs no special rights."""
    cpus = usable_cpus()
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": physical_cores(),
        "logical_cpus": len(cpus),
        "threads": threads,
        "governor": _text_or_none(_GOVERNOR),
        "busy_cores": busy_cores(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": package_versions(),
        "gpus": read_gpus(),
        "ort_spinning": "while a run lasts",
    }


def usable_cpus() -> frozenset[int]:
    """Return the logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Count the cores that this process may use: hyper-threads count once, a container's CPU quota is the limit."""
    cores = len(_core_ids(_text_or_none(_CPUINFO) or "", usable_cpus())) or len(usable_cpus())
    quota = cpu_quota()
    return cores if quota is None else min(cores, max(1, int(quota)))


def cpu_quota() -> float | None:
    """Return how many cores' time a container may use; None without a limit."""
    fields = (_text_or_none(_CPU_QUOTA) or "max").split()
    return int(fields[0]) / int(fields[1]) if len(fields) == 2 and fields[0].isdigit() else None


def default_threads() -> int:
    """Return the CPU threads to measure with where none are named: OMP_NUM_THREADS, without it all physical cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(asked) if asked.isdigit() and int(asked) > 0 else physical_cores()


def busy_cores(seconds: float = 0.3) -> float | None:
    """Measure how many of the cores that this process may use others keep busy, while it sleeps for `seconds`.

    The load average would still count what this process did a minute ago.
    """
    before = busy_ticks()
    sleep(seconds)
    after = busy_ticks()
    if before is None or after is None:
        return None
    busy = (after - before) / (os.sysconf("SC_CLK_TCK") * seconds)
    return max(busy - cpus_beyond_quota(), 0.0)


def busy_ticks() -> int | None:
    """Read the clock ticks that the CPUs which this process may run on have worked since the machine started.

    A container sees the counters of the whole machine, of which it may have few CPUs.
    """
    allowed = {f"cpu{number}" for number in usable_cpus()}
    lines = [line.split() for line in (_text_or_none(_STAT) or "").splitlines()]
    found = [fields for fields in lines if len(fields) >= 8 and fields[0] in allowed]
    if not found:
        return None
    return sum(sum(map(int, fields[1:4])) + sum(map(int, fields[6:8])) for fields in found)  # neither idle nor waiting


def cpus_beyond_quota() -> float:
    """Count the CPUs that others may keep busy without a loss, since a quota, not the CPUs, limits this process."""
    quota = cpu_quota()
    return 0.0 if quota is None else max(len(usable_cpus()) - quota, 0.0)


def cpu_model() -> str | None:
    """Read the model name of the processor; None where nothing tells it from others.

    Linux gives ARM processors no name, or that of all of one architecture; then it is that of the board, else the
    numbers of the kinds of its cores, as ARM and the other makers assign them.
    """
    if platform.system() == "Darwin":
        return _apple_model()
    cpuinfo = _text_or_none(_CPUINFO) or ""
    if kinds := _arm_cores(cpuinfo):
        return (_text_or_none(_BOARD) or "").strip("\0 ") or f"ARM cores {', '.join(kinds)}"
    named = _values_of("model name", cpuinfo)
    name = named[0] if named else platform.processor()
    return None if name.lower() in ("", "unknown", platform.machine().lower()) else name


def _apple_model() -> str | None:
    """Ask macOS for the name of the processor, such as "Apple M3 Pro"."""
    try:
        done = subprocess.run(_APPLE_NAME, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _arm_cores(cpuinfo: str) -> list[str]:
    """List maker and part of every kind of ARM core, `0x41/0xd0c`; none of another processor."""
    pairs = zip(_values_of("CPU implementer", cpuinfo), _values_of("CPU part", cpuinfo), strict=False)
    return sorted({f"{maker}/{part}" for maker, part in pairs})


def _values_of(key: str, cpuinfo: str) -> list[str]:
    """List what /proc/cpuinfo says under a key, once for every logical CPU."""
    fields = (line.partition(":") for line in cpuinfo.splitlines())
    return [value.strip() for name, _, value in fields if name.strip().lower() == key.lower()]


def cpu_flags() -> frozenset[str]:
    """Read the instruction sets that the operating system lists for the CPU; empty where it lists none."""
    for line in (_text_or_none(_CPUINFO) or "").splitlines():
        if line.lower().startswith(("flags", "features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _core_ids(cpuinfo: str, allowed: frozenset[int]) -> set[tuple[str, str]]:
    """Return (socket, core) of every allowed logical CPU; empty where /proc/cpuinfo names no cores."""
    cores = set()
    for paragraph in cpuinfo.split("\n\n"):
        pairs = (line.partition(":") for line in paragraph.splitlines())
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        if "core id" in fields and int(fields.get("processor", -1)) in allowed:
            cores.add((fields.get("physical id", "0"), fields["core id"]))
    return cores


def peak_memory_mb() -> float | None:
    """Return the peak resident memory of this process in MiB; None where the system does not report it."""
    try:
        usage = import_module("resource").getrusage(import_module("resource").RUSAGE_SELF)
    except ModuleNotFoundError:
        return None
    return float(usage.ru_maxrss) / (1 << 20 if platform.system() == "Darwin" else 1 << 10)


def _text_or_none(path: Path) -> str | None:
    """Read a file without surrounding white space; None if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return None
