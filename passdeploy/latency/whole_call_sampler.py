"""Latency sampler for backends that do not show the times of their kernels, such as ONNX Runtime on a GPU.

Whole calls are timed in the backend. The operators are timed in PyTorch, eager, on the same device and in the same
precision: layers that take longer there take longer in the backend. What differs is part of the correction that the
latency table fits between traced and untraced calls (`latency/table.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from passdeploy.latency.network_timing import NetworkTiming, steady_ms
from passdeploy.latency.torch_sampler import TorchSampler
from passdeploy.profiling.clock import Clock
from passdeploy.profiling.kernel_times import NodeTime
from passdeploy.profiling.runners import OrtRunner, Runner

if TYPE_CHECKING:
    from onnx import ModelProto


class WholeCallSampler:
    """Sampler of a backend by whole calls.

    Args:
        backend: its name.
        load: loads the network at the given widths under a name, ready to be timed.
        operators: times the operators of the same networks.
        clock: of the whole calls; None: that of `operators`.
    """

    traces_elsewhere = True

    def __init__(
        self,
        backend: str,
        load: Callable[[Mapping[str, int], str], Runner],
        operators: TorchSampler,
        *,
        clock: Clock | None = None,
    ) -> None:
        self.backend, self.block, self.clock = backend, operators.block, clock or operators.clock
        self._load, self._operators = load, operators
        self._dense: Runner | None = None

    def runner(self, widths: Mapping[str, int], name: str) -> Runner:
        """Load the network at `widths`, ready to be timed; the dense network is kept, since loading takes seconds."""
        if widths:
            return self._load(widths, name)
        if self._dense is None:
            self._dense = self._load(widths, name)
        return self._dense

    def trace(self, widths: Mapping[str, int], *, seconds: float) -> tuple[NodeTime, ...]:
        """Time the operators of the network at `widths` alone."""
        return self._operators.trace(widths, seconds=seconds)

    def measure(self, widths: Mapping[str, int], *, seconds: float) -> NetworkTiming:
        """Time the network at `widths` in the backend, then its operators, half of `seconds` each."""
        total = steady_ms(self.runner(widths, "network").run, self.clock, seconds=seconds / 2)
        return NetworkTiming(dict(widths), total, self._operators.trace(widths, seconds=seconds / 2))


def ort_loader(
    graph_at: Callable[[Mapping[str, int]], ModelProto],
    images: Tensor,
    *,
    backend: str,
    threads: int = 1,
    device: str = "cuda",
) -> Callable[[Mapping[str, int], str], Runner]:
    """Return the function that opens an ONNX Runtime session of a network at given widths and binds `images` to it.

    Args:
        graph_at: builds the graph at given widths, in the precision that is timed.
        images: the batch, shape (batch, 3, height, width).
        backend: of `profiling.runners.PROVIDERS`.
        threads: of operators on the CPU.
        device: the GPU that a backend other than `ort` runs on, as PyTorch calls it.
    """
    # two graphs: searches compare the dense network with one plan at a time
    kept_graph_at = lru_cache(maxsize=2)(lambda widths: graph_at(dict(widths)))

    def load(widths: Mapping[str, int], name: str) -> Runner:
        graph = kept_graph_at(tuple(widths.items()))
        runner = OrtRunner(name, graph, threads=threads, backend=backend, device=device)
        runner.prepare(images)
        return runner

    return load
