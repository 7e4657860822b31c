"""Is a network's time its work, or the calls of its kernels? Where it is the calls, fewer channels do not help.

On a GPU the host queues kernels while the device works: bound by launches is what takes the host nearly as long to
queue as the device to do (trtexec's rule and threshold). On a CPU a call is part of the time: how many kernels there
are is counted, and what one costs is measured on a chain of operators with nothing to do.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from passdeploy.profiling.clock import HostClock
from passdeploy.profiling.ort_profiler import profile_kernels
from passdeploy.profiling.runners import OrtRunner, Runner, TorchRunner

if TYPE_CHECKING:
    from onnx import ModelProto

ENQUEUE_SHARE = 0.8  # of the device's time; trtexec warns at the same
CALLS_SHARE = 0.5  # of a call on the CPU
_CHAIN = 64  # operators
_CALLS = 50


def launch_note(runner: Runner, median_ms: float, enqueue_ms: float | None) -> str:
    """Why fewer channels would not make this network faster, or nothing where they would.

    Args:
        runner: prepared.
        median_ms: of a call.
        enqueue_ms: what the host took to queue it; None where nothing is queued.
    """
    if enqueue_ms is not None:
        if enqueue_ms < ENQUEUE_SHARE * median_ms:
            return ""
        return f"launch-bound: the host takes {enqueue_ms:.3g} ms to queue a call; try --cuda-graph, or larger batches"
    count = _count(runner)
    each = _launch_ms(runner.backend) if count else 0.0
    if count * each < CALLS_SHARE * median_ms:
        return ""
    return f"launch-bound: calling its {count} kernels costs {count * each:.2g} ms; larger batches use them better"


def _count(runner: Runner) -> int:
    """Kernels of a call on the CPU; 0 where that cannot be told."""
    if runner.backend == "torch" and isinstance(runner, TorchRunner) and runner.device == "cpu":
        operators = _Counting()
        with operators:
            runner.run()
        return operators.count
    if runner.backend == "ort" and isinstance(runner, OrtRunner):
        return len(profile_kernels(runner.source, runner.images, threads=runner.threads))
    return 0


class _Counting(TorchDispatchMode):
    """Counts operators; those that only look at a tensor differently call no kernel, and count little."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += int(not func.is_view)
        return func(*args, **(kwargs or {}))


@lru_cache
def _launch_ms(backend: str) -> float:
    """What one operator with a single number to work on costs."""
    runner: Runner
    if backend == "torch":
        runner = TorchRunner("chain", nn.Sequential(*[nn.Hardtanh() for _ in range(_CHAIN)]))
    else:
        runner = OrtRunner("chain", _chain(), threads=1)
    runner.prepare(torch.ones(1, 1, 1, 1))
    clock = HostClock()
    times = [clock.time_ms(runner.run) for _ in range(_CALLS)]
    return median(times[_CALLS // 2 :]) / _CHAIN


def _chain() -> ModelProto:
    from onnx import TensorProto, helper

    names = [f"x{number}" for number in range(_CHAIN + 1)]
    nodes = [
        helper.make_node("Abs" if number % 2 else "Neg", [names[number]], [names[number + 1]])
        for number in range(_CHAIN)
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 1, 1, 1)) for name in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
