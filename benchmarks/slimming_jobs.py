"""One process for each network, watched: it may take so much time and memory and no more."""

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

from benchmarks.slimming_ours import measure_ours, measure_rounding
from benchmarks.slimming_peer import measure_rounding_torch_pruning, measure_torch_pruning
from benchmarks.slimming_sides import Say, first_line
from benchmarks.zoo import Entry

MEMORY_GIB = 8.0
CHECKS_TAKE = 5  # times the limit

MEASURES: dict[str, Callable[[Entry, Say], None]] = {
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
        pipe.send({"status": "memory" if is_memory else "error", "error": first_line(error)})
    pipe.send({"phase": "done", "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20})


@dataclass
class Job:
    """One network in one process."""

    entry: Entry
    side: str
    process: BaseProcess
    pipe: Connection
    limit_s: float
    phase_began_s: float
    result: dict[str, Any]

    @classmethod
    def start(cls, entry: Entry, side: str, limit_s: float) -> Job:
        """Fork from a process that has torch in memory already, and run nothing else there."""
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(side, entry, theirs), daemon=True)
        process.start()
        theirs.close()
        return cls(entry, side, process, ours, limit_s, 0.0, {"phase": "build"})

    def listen(self) -> bool:
        """Take in what the process says; whether it goes on."""
        try:
            while self.pipe.poll():
                said = dict(self.pipe.recv())
                if said.get("phase") not in (None, "slim"):  # groups and slimming share one limit
                    self.phase_began_s = _cpu_s(self.process.pid)
                self.result |= said
        except EOFError:
            self.process.join(5)
            if self.result["phase"] != "done":
                self._failed("error", f"the process died with code {self.process.exitcode}")
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
        self._failed(status, why)
        self.result.pop("phase")
        return False

    def _failed(self, status: str, why: str) -> None:
        phase = self.result["phase"]
        if "status" in self.result:  # cut and compared already: only a check failed
            self.result[phase] = f"{status}: {why}"
        else:
            self.result |= {"status": status, "error": f"{why} ({phase})"}


def _cpu_s(pid: int | None) -> float:
    """Seconds of the CPU that a process of one thread has had: what it would take on a machine of its own."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0  # gone
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_gib(pid: int | None) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0  # gone, or a system that does not say: then there is no limit
    return pages * resource.getpagesize() / 2**30


def run_all(jobs: Sequence[tuple[Entry, str]], *, workers: int, limit_s: float) -> Iterator[Job]:
    """Run every (network, side); yields each as it ends."""
    waiting, running = list(jobs), list[Job]()
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(Job.start(*waiting.pop(0), limit_s))
        wait([job.pipe for job in running], timeout=0.2)
        for job in list(running):
            if not job.listen():
                running.remove(job)
                yield job
