"""Look into a network in PyTorch: every operator is timed as it is dispatched.

A compiled network, and one that is replayed as a CUDA graph, shows no operators. Its own time is that of the whole; its
operators are those of the same network in eager mode, and what the compiler saves on them is fitted with the rest of
what a traced call differs by (`latency/table.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from passdeploy.latency.network_timing import NetworkTiming, median_ms
from passdeploy.profiling.candidates import Candidate, runner_of
from passdeploy.profiling.clock import StepClock, clock_for
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.kernel_times import FEWEST_CALLS, NodeTime, Shape, typical
from passdeploy.profiling.runners import TorchRunner, torch_threads

SKIPPED_CALLS = 1
_AHEAD = 1.5  # how much longer a device is held than the host takes to queue a call
_COUNTED_FOR_NOTHING = {"aten.detach.default", "aten.view.default", "aten.alias.default", "aten.t.default"}


class TorchSampler:
    """Times networks in PyTorch, eager or compiled.

    Args:
        network_at: the network at given widths.
        images: the batch to run, shape (batch, 3, height, width).
        threads: of PyTorch on a CPU.
        block: channels that its kernels compute together.
        backend: `torch` or `compile`.
        setting: device, precision and layout.
    """

    def __init__(
        self,
        network_at: Callable[[Mapping[str, int]], nn.Module],
        images: Tensor,
        *,
        threads: int,
        block: int,
        backend: str = "torch",
        setting: Setting | None = None,
    ) -> None:
        self.backend, self.block = backend, block
        self._network_at, self._images, self._threads = network_at, images, threads
        self._setting = setting or Setting()
        self.clock = clock_for(torch.device(self._setting.device))

    def runner(self, widths: Mapping[str, int], name: str) -> TorchRunner:
        """The network at `widths`, ready to be timed."""
        candidate = Candidate(name, module=self._network_at(widths))
        runner = runner_of(candidate, self.backend, self._threads, self._setting)
        assert isinstance(runner, TorchRunner)
        runner.prepare(self._images)
        return runner

    def measure(self, widths: Mapping[str, int], *, seconds: float) -> NetworkTiming:
        """Time the network at `widths`, then trace it, half of `seconds` each."""
        clock, runner = self.clock, self.runner(widths, "network")
        with torch_threads(self._threads):
            total = median_ms(runner.run, clock, seconds=seconds / 2)
            timer, began, calls = OperatorTimer(clock), clock.now(), 0
            while calls < SKIPPED_CALLS + FEWEST_CALLS or clock.now() - began < seconds / 2:
                timer.time(runner.run_eagerly)
                calls += 1
        return NetworkTiming(dict(widths), total, timer.nodes())


class OperatorTimer(TorchDispatchMode):
    """Notes what every operator reads, writes and takes."""

    def __init__(self, clock: StepClock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._clock, self._queueing_ms = clock, 0.0
        self._spans: list[tuple[str, Callable[[], float]]] = []  # of this call
        self._times: dict[str, list[float]] = defaultdict(list)
        self._seen: dict[str, tuple[str, tuple[Shape, ...], int]] = {}

    def time(self, call: Callable[[], object]) -> None:
        """Watch one call of a network."""
        self._clock.hold(_AHEAD * self._queueing_ms)
        began = self._clock.now()
        with self:
            call()
        took_ms = (self._clock.now() - began) * 1e3  # longer where a full queue made the host wait
        self._queueing_ms = min(took_ms, self._queueing_ms or took_ms)
        for name, took in self._spans:
            self._times[name].append(took())
        self._spans = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result: list[Any] = []
        took = self._clock.span(lambda: result.append(func(*args, **(kwargs or {}))))
        kind = str(func)
        if kind not in _COUNTED_FOR_NOTHING:
            name = f"{len(self._spans)}:{kind}"
            read, written = _shapes((args, kwargs)), _shapes(result)
            self._seen[name] = (kind, (*read, *written), len(read))
            self._spans.append((name, took))
        return result[0]

    def nodes(self) -> tuple[NodeTime, ...]:
        """Every operator with its typical time."""
        return tuple(
            NodeTime(name, *self._seen[name], typical(times[SKIPPED_CALLS:] or times))
            for name, times in self._times.items()
        )


def _shapes(values: Any) -> tuple[Shape, ...]:
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
