"""Latency sampler for PyTorch, eager or compiled: time a network, and each of its operators as it is dispatched.

A compiled network, or one replayed as a CUDA graph, dispatches no operators. Then only the whole call is timed as it
runs, and the operators are timed in eager mode; the difference is part of the correction that the latency table fits
between traced and untraced calls (`latency/table.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from passdeploy.latency.network_timing import NetworkTiming, steady_ms
from passdeploy.models.function_calls import FunctionCallTracker
from passdeploy.profiling.candidates import Candidate, make_runner
from passdeploy.profiling.clock import StepClock, clock_for
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.interleaved import BUILT_ONCE
from passdeploy.profiling.kernel_times import (
    FEWEST_CALLS,
    SKIPPED_CALLS,
    NodeTime,
    Shape,
    name_in_module,
    typical_time,
)
from passdeploy.profiling.runners import TorchRunner, torch_threads

_DELAY_FACTOR = 1.5  # a device is delayed by this times the time in which the host queues a call
_FREE_OPERATORS = {"aten.detach.default", "aten.view.default", "aten.alias.default", "aten.t.default"}


class TorchSampler:
    """Sampler of networks in PyTorch, eager or compiled.

    Args:
        network_at: function from widths to the network.
        images: the batch to run, shape (batch, 3, height, width).
        threads: of PyTorch on a CPU.
        block: channels that its kernels compute together.
        backend: `torch` or `compile`.
        setting: device, precision and memory layout.
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
        self.backend, self.block, self.traces_elsewhere = backend, block, backend == "compile"
        self._network_at, self._images, self._threads = network_at, images, threads
        self._setting = setting or Setting()
        self._dense: TorchRunner | None = None
        self.clock = clock_for(torch.device(self._setting.device))

    def runner(self, widths: Mapping[str, int], name: str) -> TorchRunner:
        """Load the network at `widths`, ready to be timed; a compiled dense network is kept."""
        if widths or self.backend not in BUILT_ONCE:
            return self._load(widths, name)
        if self._dense is None:
            self._dense = self._load(widths, name)
        return self._dense

    def _load(self, widths: Mapping[str, int], name: str) -> TorchRunner:
        """Build and prepare the network, with the threads that it is timed with: the compiler compiles it for those."""
        candidate = Candidate(name, module=self._network_at(widths))
        with torch_threads(self._threads):
            runner = make_runner(candidate, self.backend, self._threads, self._setting)
            assert isinstance(runner, TorchRunner)
            runner.prepare(self._images)
        return runner

    def measure(self, widths: Mapping[str, int], *, seconds: float) -> NetworkTiming:
        """Time the network at `widths`, then trace it, half of `seconds` each."""
        runner = self.runner(widths, "network")
        with torch_threads(self._threads):
            total = steady_ms(runner.run, self.clock, seconds=seconds / 2)
        return NetworkTiming(dict(widths), total, self._trace(runner, seconds / 2))

    def trace(self, widths: Mapping[str, int], *, seconds: float) -> tuple[NodeTime, ...]:
        """Time the operators of the network at `widths` alone."""
        setting = replace(self._setting, cuda_graph=False)
        runner = TorchRunner("traced", self._network_at(widths), setting=setting)
        runner.prepare(self._images)
        return self._trace(runner, seconds)

    def _trace(self, runner: TorchRunner, seconds: float) -> tuple[NodeTime, ...]:
        clock = self.clock
        timer, began, calls = OperatorTimer(clock), clock.now(), 0
        with torch_threads(self._threads), timer.naming_modules(runner.module):
            while calls < SKIPPED_CALLS + FEWEST_CALLS or clock.now() - began < seconds:
                timer.time(runner.run_eagerly)
                calls += 1
        return timer.nodes()


class OperatorTimer(TorchDispatchMode):
    """Dispatch mode that records the input shapes, output shapes and times of every operator."""

    def __init__(self, clock: StepClock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._clock, self._queueing_ms, self._modules = clock, 0.0, FunctionCallTracker()
        self._spans: dict[str, Callable[[], float]] = {}  # of the current call
        self._times: dict[str, list[float]] = defaultdict(list)
        self._operators: dict[str, tuple[str, tuple[Shape, ...], int]] = {}

    def naming_modules(self, model: nn.Module) -> AbstractContextManager[None]:
        """Name operators after the module of `model` that runs them, inside this context."""
        return self._modules.hooked_into(model)

    def time(self, call: Callable[[], object]) -> None:
        """Time the operators of one call of a network."""
        self._clock.delay_device(_DELAY_FACTOR * self._queueing_ms)
        began = self._clock.now()
        with self:
            call()
        took_ms = (self._clock.now() - began) * 1e3  # longer where a full queue made the host wait
        self._queueing_ms = min(took_ms, self._queueing_ms or took_ms)
        for name, span in self._spans.items():
            self._times[name].append(span())
        self._spans = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result: list[Any] = []
        took = self._clock.time_step(lambda: result.append(func(*args, **(kwargs or {}))))
        kind = str(func)
        if kind not in _FREE_OPERATORS:
            name = name_in_module(self._modules.module, kind, self._spans)
            read, written = _tensor_shapes((args, kwargs)), _tensor_shapes(result)
            self._operators[name] = (kind, (*read, *written), len(read))
            self._spans[name] = took
        return result[0]

    def nodes(self) -> tuple[NodeTime, ...]:
        """Return every operator with its typical time."""
        return tuple(
            NodeTime(name, *self._operators[name], typical_time(times[SKIPPED_CALLS:] or times))
            for name, times in self._times.items()
        )


def _tensor_shapes(values: Any) -> tuple[Shape, ...]:
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
