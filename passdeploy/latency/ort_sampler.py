"""Latency sampler for ONNX Runtime: time a network at any widths, whole and kernel by kernel with its own profiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from passdeploy.latency.network_timing import NetworkTiming, steady_ms
from passdeploy.profiling.clock import Clock, HostClock
from passdeploy.profiling.kernel_times import FEWEST_CALLS, SKIPPED_CALLS, NodeTime
from passdeploy.profiling.onnx_layers import OnnxLayer, merge_by_layer
from passdeploy.profiling.ort_profiler import node_times, profile_kernels
from passdeploy.profiling.runners import OrtRunner

if TYPE_CHECKING:
    from onnx import ModelProto


class OrtSampler:
    """The latency sampler of ONNX Runtime on the CPU.

    Args:
        graph_at: builds the ONNX graph at given widths.
        images: the batch to run, shape (batch, 3, height, width).
        threads: of ONNX Runtime.
        block: channels that its kernels compute together.
        layers: name of a kernel -> its layer, see `find_layers`.
        clock: another source of time, for tests.
    """

    backend = "ort"

    def __init__(
        self,
        graph_at: Callable[[Mapping[str, int]], ModelProto],
        images: Tensor,
        *,
        threads: int,
        block: int,
        layers: Mapping[str, OnnxLayer] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.block, self._layers = block, layers or {}
        self._images, self._threads, self.clock = images, threads, clock or HostClock()
        # two graphs: searches compare the dense network with one plan at a time
        self._graph_at = lru_cache(maxsize=2)(lambda widths: graph_at(dict(widths)))

    def runner(self, widths: Mapping[str, int], name: str) -> OrtRunner:
        """Build the network at `widths` and prepare it to be timed."""
        return self._prepare_runner(self._graph_at(tuple(widths.items())), name)

    def measure(self, widths: Mapping[str, int], *, seconds: float) -> NetworkTiming:
        """Time the network at `widths`, then trace it, half of `seconds` each."""
        graph = self._graph_at(tuple(widths.items()))
        total = steady_ms(self._prepare_runner(graph, "network").run, self.clock, seconds=seconds / 2)
        return NetworkTiming(dict(widths), total, self._trace(graph, seconds / 2))

    def _trace(self, graph: ModelProto, seconds: float) -> tuple[NodeTime, ...]:
        """Profile the graph for about `seconds` and sum its kernels by layer."""
        events = profile_kernels(
            graph,
            self._images,
            threads=self._threads,
            fewest_calls=SKIPPED_CALLS + FEWEST_CALLS,
            seconds=seconds,
            clock=self.clock,
        )
        return merge_by_layer(node_times(events), self._layers)

    def _prepare_runner(self, graph: ModelProto, name: str) -> OrtRunner:
        """Open a session of `graph` and bind the images."""
        runner = OrtRunner(name, graph, threads=self._threads)
        runner.prepare(self._images)
        return runner
