"""Latency sampler for TensorRT: build an engine of a network at any widths, time it whole and layer by layer.

Engines are built as the export builds them, with one timing cache for all: a convolution whose shape was in an earlier
engine is not timed by the builder again, which is most of a build.
"""

from __future__ import annotations

import shutil
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from passdeploy.channels.blocks import Block, skipped_blocks, skipped_in
from passdeploy.export.trt_engine import EngineOptions, build_engine
from passdeploy.export.trt_sidecar import sidecar_path
from passdeploy.latency.engine_layers import EngineLayer, spread_over_layers
from passdeploy.latency.network_timing import NetworkTiming, steady_ms
from passdeploy.profiling.clock import Clock
from passdeploy.profiling.kernel_times import module_of
from passdeploy.profiling.onnx_layers import OnnxLayer
from passdeploy.profiling.runners import Runner
from passdeploy.profiling.trt_runner import EngineRunner, time_engine_layers

if TYPE_CHECKING:
    from onnx import ModelProto

_KEPT_ENGINES = 3  # the dense network, and the plans that a search compares it with


class EngineBackend(Protocol):
    """The part of TensorRT that the sampler needs; tests have one with a known cost."""

    def build(self, graph: ModelProto, path: Path) -> None:
        """Write the engine of a graph to `path`."""
        ...

    def load(self, path: Path, name: str) -> Runner:
        """Load an engine under a name."""
        ...

    def layer_times(self, runner: Runner) -> Mapping[str, float]:
        """Time the layers of a prepared engine: name -> milliseconds, in the order of execution."""
        ...


class TensorRTBackend:
    """Engines of TensorRT, built on the GPU of this machine.

    Args:
        precision: of the graphs.
        batch: images per call; engines are built for this batch alone.
        timing_cache: file of the builder's measurements; None: none is kept.
        cuda_graph: replay a call as a CUDA graph.
        device: that holds the tensors.
    """

    def __init__(
        self, precision: str, batch: int, *, timing_cache: Path | None, cuda_graph: bool, device: str = "cuda"
    ) -> None:
        self._precision, self._batch = precision, batch
        self._options = EngineOptions(timing_cache=timing_cache)
        self._cuda_graph, self._device = cuda_graph, device

    def build(self, graph: ModelProto, path: Path) -> None:
        """Write the engine of a graph, and its sidecar, to `path`."""
        source = path.with_suffix(".onnx")
        source.write_bytes(graph.SerializeToString())
        build_engine(source, path, batch=(self._batch,) * 3, precision=self._precision, options=self._options)
        source.unlink()

    def load(self, path: Path, name: str) -> Runner:
        """Load an engine under a name."""
        return EngineRunner(name, path, cuda_graph=self._cuda_graph, device=self._device)

    def layer_times(self, runner: Runner) -> Mapping[str, float]:
        """Time the layers of a prepared engine with TensorRT's profiler."""
        assert isinstance(runner, EngineRunner)
        return time_engine_layers(runner)


class EngineSampler:
    """The latency sampler of TensorRT.

    Args:
        graph_at: builds the ONNX graph at given widths, in the precision that is timed.
        images: the batch to run, shape (batch, 3, height, width).
        engines: builds, loads and traces engines.
        layers: of the network, in the order of the graph.
        names: name of an ONNX node -> the layer it belongs to.
        block: channels that its kernels compute together.
        clock: of the device.
        blocks: of the network; a layer goes with the blocks that hold the module it is named after.
    """

    backend = "tensorrt"

    def __init__(
        self,
        graph_at: Callable[[Mapping[str, int]], ModelProto],
        images: Tensor,
        engines: EngineBackend,
        *,
        layers: tuple[EngineLayer, ...],
        names: Mapping[str, OnnxLayer],
        block: int,
        clock: Clock,
        blocks: Sequence[Block] = (),
    ) -> None:
        self.block, self.clock, self._blocks = block, clock, blocks
        self._graph_at, self._images, self._engines = graph_at, images, engines
        self._layers, self._names = layers, names
        self._folder = Path(mkdtemp(prefix="passdeploy-engines-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)  # deleted with the sampler
        self._built: OrderedDict[tuple[tuple[str, int], ...], Path] = OrderedDict()  # the latest one last
        self._count = 0

    def runner(self, widths: Mapping[str, int], name: str) -> Runner:
        """Load the engine of the network at `widths`, built if it is not there yet, and bind the images."""
        runner = self._engines.load(self._engine(widths), name)
        runner.prepare(self._images)
        return runner

    def measure(self, widths: Mapping[str, int], *, seconds: float) -> NetworkTiming:
        """Time the engine at `widths` for half of `seconds`, then its layers."""
        runner = self.runner(widths, "network")
        total = steady_ms(runner.run, self.clock, seconds=seconds / 2)
        skipped = skipped_blocks(self._blocks, skipped_in(widths))
        layers = [one for one in self._layers if not any(block.holds(module_of(one.name)) for block in skipped)]
        nodes = spread_over_layers(self._engines.layer_times(runner), layers, self._names)
        return NetworkTiming(dict(widths), total, nodes)

    def _engine(self, widths: Mapping[str, int]) -> Path:
        """Return the file of the engine at `widths`; the one used longest ago makes room for a new one."""
        key = tuple(widths.items())
        if key not in self._built:
            self._count += 1
            path = self._folder / f"network-{self._count}.engine"
            self._engines.build(self._graph_at(widths), path)
            self._built[key] = path
            if len(self._built) > _KEPT_ENGINES:
                _, oldest = self._built.popitem(last=False)
                oldest.unlink(missing_ok=True)
                sidecar_path(oldest).unlink(missing_ok=True)
        self._built.move_to_end(key)
        return self._built[key]
