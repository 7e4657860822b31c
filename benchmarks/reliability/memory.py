"""Memory that grows: over 1,000 training steps, 100 sessions of ONNX Runtime and 50 searches for channel groups.

Each is done a tenth of the times first, since caches and allocators fill up. Then the resident memory of the process
may grow by less than two percent.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.reliability.tally import Tally
from passdeploy.export.ort_session import open_session
from passdeploy.grouping.find import find_groups
from passdeploy.models.build import build_model

GOAL = 3
MOST_GROWTH = 0.02


def measure(count: int = GOAL, seed: int = 0) -> Tally:
    """Measure the first `count` of the three."""
    tally = Tally()
    with TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        network = build_model("passdeploy/resnet20_cifar", num_classes=10)
        rows: list[tuple[str, int, Callable[[], object]]] = [
            ("training steps", 1000, _training_step(network)),
            ("sessions", 100, _session(Path(folder) / "m.onnx")),
            ("searches for groups", 50, lambda: find_groups(network, torch.zeros(1, 3, 32, 32))),
        ]
        for name, times, work in rows[:count]:
            growth, megabytes = _growth(times, work)
            problem = None if growth < MOST_GROWTH else f"{growth:.1%} more memory"
            tally.add(name, problem, trial=f"{times} {name}")
            tally.facts[name] = {"times": times, "growth": round(growth, 5), "megabytes": round(megabytes, 1)}
    return tally


def _training_step(network: nn.Module) -> Callable[[], object]:
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network.train()(images), labels).backward()
        optimizer.step()

    return step


def _session(path: Path) -> Callable[[], object]:
    from passdeploy.export.onnx_graph import export_onnx

    images = torch.rand(2, 3, 32, 32)
    export_onnx(build_model("passdeploy/resnet20_cifar", num_classes=10).eval(), images, path)

    def session() -> None:
        opened = open_session(path, threads=1)
        opened.run(None, {opened.get_inputs()[0].name: images.numpy()})

    return session


def _growth(times: int, work: Callable[[], object]) -> tuple[float, float]:
    """Do something many times; return the share by which resident memory grew, and the megabytes at the end."""
    for _ in range(max(5, times // 10)):
        work()
    before = _resident_bytes()
    for _ in range(times):
        work()
    after = _resident_bytes()
    return after / before - 1, after / 2**20


def _resident_bytes() -> int:
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not say how much memory a process has")
