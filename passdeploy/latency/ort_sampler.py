"""Look into a network in ONNX Runtime: its own profiler says what every node takes, after its own fusions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from torch import Tensor

from passdeploy.latency.network_timing import NetworkTiming, median_ms
from passdeploy.profiling.clock import Clock, HostClock
from passdeploy.profiling.kernel_times import FEWEST_CALLS, SKIPPED_CALLS, NodeTime, read_trace
from passdeploy.profiling.onnx_layers import OnnxLayer, by_layer
from passdeploy.profiling.runners import OrtRunner

if TYPE_CHECKING:
    from onnx import ModelProto


class OrtSampler:
    """Times networks in ONNX Runtime on the CPU.

    Args:
        graph_at: the ONNX graph at given widths.
        images: the batch to run, shape (batch, 3, height, width).
        threads: of ONNX Runtime.
        block: channels that its kernels compute together.
        layers: kernel -> layer, as `find_layers` tells.
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
        # the dense network and a plan are loaded in turns
        self._graph_at = lru_cache(maxsize=2)(lambda widths: graph_at(dict(widths)))

    def runner(self, widths: Mapping[str, int], name: str) -> OrtRunner:
        """The network at `widths`, ready to be timed."""
        return self._bound(self._graph_at(tuple(widths.items())), name)

    def measure(self, widths: Mapping[str, int], *, seconds: float) -> NetworkTiming:
        """Time the network at `widths`, then trace it, half of `seconds` each."""
        graph = self._graph_at(tuple(widths.items()))
        total = median_ms(self._bound(graph, "network").run, self.clock, seconds=seconds / 2)
        return NetworkTiming(dict(widths), total, self._trace(graph, seconds / 2))

    def _trace(self, graph: ModelProto, seconds: float) -> tuple[NodeTime, ...]:
        with TemporaryDirectory() as folder:
            runner = self._bound(graph, "traced", profile_to=Path(folder) / "trace")
            began, calls = self.clock.now(), 0
            while calls < SKIPPED_CALLS + FEWEST_CALLS or self.clock.now() - began < seconds:
                runner.run()
                calls += 1
            nodes = read_trace(json.loads(Path(runner.session.end_profiling()).read_text()))
        return by_layer(nodes, self._layers)

    def _bound(self, graph: ModelProto, name: str, profile_to: Path | None = None) -> OrtRunner:
        runner = OrtRunner(name, graph, threads=self._threads, profile_to=profile_to)
        runner.prepare(self._images)
        return runner
