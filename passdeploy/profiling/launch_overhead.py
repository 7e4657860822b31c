"""Kernel launch overhead: find networks whose time is mostly the calls of their kernels, which pruning cannot speed up.

On a GPU the host queues kernels while the device works: a network is launch-bound if queueing takes the host nearly as
long as the work takes the device (trtexec's rule and threshold). On a CPU the calls are part of the time: the kernels
are counted, and the cost of one call is measured on a chain of operators that work on a single number.
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

ENQUEUE_SHARE = 0.8  # of the device's time; trtexec warns at the same share
LAUNCH_SHARE = 0.5  # of the time of a network on the CPU
_CHAIN_LENGTH = 64  # operators of the chain that the cost of a call is measured on
_TIMED_CALLS = 50


def launch_note(runner: Runner, median_ms: float, enqueue_ms: float | None) -> str:
    """Write the note for a launch-bound network; an empty string for any other.

    Args:
        runner: the network, prepared.
        median_ms: median time of a call.
        enqueue_ms: time the host took to queue a call; None where nothing is queued.
    """
    if enqueue_ms is not None:
        if enqueue_ms < ENQUEUE_SHARE * median_ms:
            return ""
        return f"launch-bound: the host takes {enqueue_ms:.3g} ms to queue a call; try --cuda-graph, or larger batches"
    count = _count_kernels(runner)
    launch_ms = _launch_ms(runner.backend) if count else 0.0
    if count * launch_ms < LAUNCH_SHARE * median_ms:
        return ""
    return f"launch-bound: calling its {count} kernels costs {count * launch_ms:.2g} ms; larger batches use them better"


def _count_kernels(runner: Runner) -> int:
    """Count the kernels of a call on the CPU; 0 for backends where they cannot be counted."""
    if runner.backend == "torch" and isinstance(runner, TorchRunner) and runner.device == "cpu":
        counter = _KernelCounter()
        with counter:
            runner.run()
        return counter.count
    if runner.backend == "ort" and isinstance(runner, OrtRunner):
        return len(profile_kernels(runner.source, *runner.inputs, threads=runner.threads))
    return 0


class _KernelCounter(TorchDispatchMode):
    """A dispatch mode that counts the operators of PyTorch; views are left out, since they call no kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += int(not func.is_view)
        return func(*args, **(kwargs or {}))


@lru_cache
def _launch_ms(backend: str) -> float:
    """Measure the time of one operator that works on a single number: mostly its call."""
    runner: Runner
    if backend == "torch":
        runner = TorchRunner("chain", nn.Sequential(*[nn.Hardtanh() for _ in range(_CHAIN_LENGTH)]))
    else:
        runner = OrtRunner("chain", _elementwise_chain(), threads=1)
    runner.prepare(torch.ones(1, 1, 1, 1))
    clock = HostClock()
    times = [clock.time_ms(runner.run) for _ in range(_TIMED_CALLS)]
    return median(times[_TIMED_CALLS // 2 :]) / _CHAIN_LENGTH


def _elementwise_chain() -> ModelProto:
    """Build an ONNX graph of elementwise operators in a row, on a tensor with one element."""
    from onnx import TensorProto, helper

    names = [f"x{number}" for number in range(_CHAIN_LENGTH + 1)]
    nodes = [
        helper.make_node("Abs" if number % 2 else "Neg", [names[number]], [names[number + 1]])
        for number in range(_CHAIN_LENGTH)
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 1, 1, 1)) for name in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
