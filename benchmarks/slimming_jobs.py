"""Processes of `slimming.py`, one for each network, with limits on CPU time and memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.slimming_common import Report, error_summary
from benchmarks.slimming_ours import measure_ours, measure_rounding
from benchmarks.slimming_peer import measure_rounding_torch_pruning, measure_torch_pruning
from benchmarks.zoo import Entry

MEMORY_GIB = 8.0
CHECKS_TAKE = 5  # times the limit

MEASURES: dict[str, Callable[[Entry, Report], None]] = {
    "ours": measure_ours,
    "torch_pruning": measure_torch_pruning,
    "ours_rounded": measure_rounding,
    "torch_pruning_rounded": measure_rounding_torch_pruning,
}


def _child(side: str, entry: Entry, pipe: Connection) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    try:
        MEASURES[side](entry, pipe.send)
    except BaseException as error:
        is_memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
        pipe.send({"status": "memory" if is_memory else "error", "error": error_summary(error)})
    pipe.send({"phase": "done", "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20})


@dataclass
class Job:
    """A network that is measured in a process of its own."""

    entry: Entry
    side: str
    process: BaseProcess
    pipe: Connection
    limit_s: float
    phase_began_s: float
    result: dict[str, Any]

    @classmethod
    def start(cls, entry: Entry, side: str, limit_s: float) -> Job:
        """Start the process, forked from a server that has imported torch and runs nothing else."""
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(side, entry, theirs), daemon=True)
        process.start()
        theirs.close()
        return cls(entry, side, process, ours, limit_s, 0.0, {"phase": "build"})

    def update(self) -> bool:
        """Read the messages of the process and check its limits; return False once it has ended."""
        try:
            while self.pipe.poll():
                message = dict(self.pipe.recv())
                if message.get("phase") not in (None, "slim"):  # groups and slimming share one limit
                    self.phase_began_s = _cpu_s(self.process.pid)
                self.result |= message
        except EOFError:
            self.process.join(5)
            if self.result["phase"] != "done":
                self._record_failure("error", f"the process died with code {self.process.exitcode}")
            self.result.pop("phase")
            return False
        if _cpu_s(self.process.pid) - self.phase_began_s > self._allowed_s:
            return self._stop("timeout", f"no result after {self._allowed_s:.0f} s")
        if (held := _resident_gib(self.process.pid)) > MEMORY_GIB:
            return self._stop("memory", f"{held:.1f} GiB")
        return True

    @property
    def _allowed_s(self) -> float:
        return self.limit_s * (1 if self.result["phase"] in ("groups", "slim") else CHECKS_TAKE)

    def _stop(self, status: str, why: str) -> bool:
        self.process.kill()
        self.process.join()
        self._record_failure(status, why)
        self.result.pop("phase")
        return False

    def _record_failure(self, status: str, why: str) -> None:
        phase = self.result["phase"]
        if "status" in self.result:  # the network was cut and compared before: only a check failed
            self.result[phase] = f"{status}: {why}"
        else:
            self.result |= {"status": status, "error": f"{why} ({phase})"}


def _cpu_s(pid: int | None) -> float:
    """Return the CPU seconds that a process has used; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0  # gone
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_gib(pid: int | None) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0  # the process is gone, or the system has no /proc: then there is no limit
    return pages * resource.getpagesize() / 2**30


def run_all(jobs: Sequence[tuple[Entry, str]], *, workers: int, limit_s: float) -> Iterator[Job]:
    """Run a job for every (network, library) and yield each as it ends."""
    waiting, running = list(jobs), list[Job]()
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(Job.start(*waiting.pop(0), limit_s))
        wait([job.pipe for job in running], timeout=0.2)
        for job in list(running):
            if not job.update():
                running.remove(job)
                yield job
