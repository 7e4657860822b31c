"""Look into a network in PyTorch eager: every operator is timed as it is dispatched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from passdeploy.latency.observation import FEWEST_CALLS, NodeTime, Observation, Shape, median_ms, typical
from passdeploy.profiling.clock import Clock, HostClock
from passdeploy.profiling.runners import TorchRunner, torch_threads

_SKIPPED_CALLS = 1
_COUNTED_FOR_NOTHING = {"aten.detach.default", "aten.view.default", "aten.alias.default", "aten.t.default"}


class TorchProber:
    """Times networks in PyTorch on the CPU.

    Args:
        network_at: the network at given widths.
        images: the batch to run, shape (batch, 3, height, width).
        threads: of PyTorch.
        block: channels that its kernels compute together.
        clock: another source of time, for tests.
    """

    backend = "torch"

    def __init__(
        self,
        network_at: Callable[[Mapping[str, int]], nn.Module],
        images: Tensor,
        *,
        threads: int,
        block: int,
        clock: Clock | None = None,
    ) -> None:
        self.block = block
        self._network_at, self._images, self._threads, self._clock = network_at, images, threads, clock or HostClock()

    def runner(self, widths: Mapping[str, int], name: str) -> TorchRunner:
        """The network at `widths`, ready to be timed."""
        runner = TorchRunner(name, self._network_at(widths))
        runner.prepare(self._images)
        return runner

    def observe(self, widths: Mapping[str, int], *, seconds: float) -> Observation:
        """Time the network at `widths`, then trace it, half of `seconds` each."""
        runner = self.runner(widths, "network")
        with torch_threads(self._threads):
            total = median_ms(runner.run, self._clock, seconds=seconds / 2)
            timer, began, calls = _OperatorTimer(self._clock), self._clock.now(), 0
            while calls < _SKIPPED_CALLS + FEWEST_CALLS or self._clock.now() - began < seconds / 2:
                with timer:
                    runner.run()
                timer.end_call()
                calls += 1
        return Observation(dict(widths), total, timer.nodes())


class _OperatorTimer(TorchDispatchMode):
    """Notes what every operator reads, writes and takes."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._clock, self._place = clock, 0
        self._times: dict[str, list[float]] = defaultdict(list)
        self._seen: dict[str, tuple[str, tuple[Shape, ...], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result: list[Any] = []
        took = self._clock.time_ms(lambda: result.append(func(*args, **(kwargs or {}))))
        kind = str(func)
        if kind not in _COUNTED_FOR_NOTHING:
            name = f"{self._place}:{kind}"
            read, written = _shapes((args, kwargs)), _shapes(result)
            self._seen[name] = (kind, (*read, *written), len(read))
            self._times[name].append(took)
            self._place += 1
        return result[0]

    def end_call(self) -> None:
        """The next operator is the network's first."""
        self._place = 0

    def nodes(self) -> tuple[NodeTime, ...]:
        """Every operator with its typical time."""
        return tuple(
            NodeTime(name, *self._seen[name], typical(times[_SKIPPED_CALLS:] or times))
            for name, times in self._times.items()
        )


def _shapes(values: Any) -> tuple[Shape, ...]:
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
