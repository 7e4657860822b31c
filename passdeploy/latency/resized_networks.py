"""Networks resized to any widths, as PyTorch modules or ONNX graphs, and the choice of the sampler that times them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from passdeploy.channels.blocks import is_presence, presence, skipped_in
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.channels.widths import minimum_width
from passdeploy.errors import MissingExtra, UsageError
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.export.ort_session import open_session
from passdeploy.export.precision import choose_opset
from passdeploy.export.trt_api import load_trt
from passdeploy.export.trt_binding import require_gpu_of_torch
from passdeploy.latency.cache_folder import timing_cache_path
from passdeploy.latency.deployed_precision import DEPLOYED_PRECISIONS, in_precision
from passdeploy.latency.engine_layers import engine_layers
from passdeploy.latency.engine_sampler import EngineSampler, TensorRTBackend
from passdeploy.latency.measurement_context import MeasurementContext, block_of
from passdeploy.latency.network_timing import LatencySampler
from passdeploy.latency.onnx_resizing import ResizableGraph, name_nodes_by_module_
from passdeploy.latency.ort_sampler import OrtSampler
from passdeploy.latency.torch_sampler import TorchSampler
from passdeploy.latency.whole_call_sampler import WholeCallSampler, ort_loader
from passdeploy.models.cloning import deep_copy
from passdeploy.profiling.clock import clock_of_backend
from passdeploy.profiling.execution import Setting
from passdeploy.runtime.cuda_driver import require_gpu
from passdeploy.runtime.device_memory import is_out_of_memory
from passdeploy.runtime.names import ON_GPU
from passdeploy.slimming.slim import slim

if TYPE_CHECKING:
    from onnx import ModelProto

TABLE_BACKENDS = ("ort", "torch", "compile", "ort-cuda", "tensorrt")


def make_sampler(
    backend: str,
    model: nn.Module,
    channels: ChannelMap,
    images: Tensor,
    *,
    threads: int,
    setting: Setting | None = None,
) -> LatencySampler:
    """Make the sampler that times `model` at any widths.

    Args:
        backend: one of `TABLE_BACKENDS`.
        model: the dense network; it is not changed.
        channels: its groups.
        images: the batch that is timed, shape (batch, 3, height, width).
        threads: of the backend, on a CPU.
        setting: device, precision, memory layout and CUDA graph.

    Raises:
        UsageError: no table can be measured on this backend, or not with this setting.
        MissingError: this machine lacks the device, or what the backend needs.
    """
    setting = setting or Setting()
    require_table_support(backend, setting)
    setting.require_possible((backend,))
    require_backend_here(backend)
    block = block_of(backend, setting)
    if backend in ("torch", "compile"):
        networks = SlimNetworks(model, channels)
        return TorchSampler(networks.at, images, threads=threads, block=block, backend=backend, setting=setting)
    graphs = OnnxNetworks(model, channels, images, precision=setting.precision, block=block)
    if backend == "ort":
        return OrtSampler(graphs.at, images, threads=threads, block=block, layers=graphs.layers)
    device = setting.device_of(backend)
    if backend == "tensorrt":
        here = MeasurementContext.here(backend=backend, threads=threads, batch=0, image_shape=(), setting=setting)
        engines = TensorRTBackend(
            setting.precision,
            len(images),
            timing_cache=timing_cache_path(here.processor, here.version),
            cuda_graph=setting.cuda_graph,
            device=str(device),
        )
        return EngineSampler(
            graphs.at,
            images,
            engines,
            layers=engine_layers(graphs.source, graphs.layers),
            names=graphs.layers,
            block=block,
            clock=clock_of_backend(backend, device),
            blocks=channels.blocks,
        )
    in_pytorch = Setting(device=str(device), precision=setting.precision)
    operators = TorchSampler(SlimNetworks(model, channels).at, images, threads=threads, block=block, setting=in_pytorch)
    load = ort_loader(graphs.at, images, backend=backend, threads=threads, device=str(device))
    return WholeCallSampler(backend, load, operators, clock=clock_of_backend(backend, device))


def require_table_support(backend: str, setting: Setting) -> None:
    """Raise UsageError where no table can be measured with this backend and setting, on any machine."""
    if backend not in TABLE_BACKENDS:
        raise UsageError(
            f"no latency table can be measured on {backend} in this version: choose from {', '.join(TABLE_BACKENDS)}.\n"
            "Ask for macs, export, and measure with: passdeploy profile"
        )
    if backend == "ort" and setting != Setting():
        raise UsageError(
            "ONNX Runtime's latency tables on the CPU are in fp32.\n"
            "For a GPU choose the backend ort-cuda or tensorrt; for another precision or layout also torch or compile."
        )
    if backend == "ort-cuda" and setting.precision == "int8":
        raise UsageError(
            "asked for int8 on ort-cuda: ONNX Runtime's CUDA provider has no int8 kernels for convolutions.\n"
            "Choose fp16, or the backend tensorrt for int8."
        )
    if backend == "tensorrt" and setting.precision not in DEPLOYED_PRECISIONS:
        known = ", ".join(DEPLOYED_PRECISIONS)
        raise UsageError(f"latency tables of engines are {known}, not {setting.precision}: choose one of these.")


def require_backend_here(backend: str) -> None:
    """Raise MissingError where this machine lacks the GPU or the software that a backend needs."""
    if backend not in ON_GPU:
        return
    hint = (
        "Measure on the target, with passdeploy profile --table, and name that file in prune.measure.table; "
        "or choose a backend that runs here."
    )
    require_gpu(f"measuring on {backend}", hint=hint)
    require_gpu_of_torch(f"a measurement on {backend}")  # its memory, streams and events are PyTorch's
    if backend == "tensorrt":
        load_trt("tensorrt")


class SlimNetworks:
    """PyTorch modules at any widths, with blocks skipped; the first channels of every group stay."""

    def __init__(self, model: nn.Module, channels: ChannelMap) -> None:
        self._model, self._channels = deep_copy(model).cpu().eval(), channels

    def at(self, widths: Mapping[str, int]) -> nn.Module:
        """Cut a copy of the network to `widths`; groups and blocks not named stay whole."""
        kept = {name: tuple(range(width)) for name, width in widths.items() if not is_presence(name)}
        return slim(self._model, self._channels.groups, Plan(kept, skipped_in(widths)), self._channels.blocks)


class OnnxNetworks:
    """ONNX graphs at any widths: exported once and cut, or exported each time where the graph cannot be cut.

    Args:
        model: the dense network.
        channels: its groups.
        images: the batch, which is fixed in the graphs.
        precision: of the graphs.
        block: channels that kernels compute together.
    """

    def __init__(
        self, model: nn.Module, channels: ChannelMap, images: Tensor, *, precision: str = "fp32", block: int = 8
    ) -> None:
        self._images, self._modules = images, SlimNetworks(_with_distinct_weights(model), channels)
        self._precision, self._channels = precision, channels
        self.source: ModelProto = self._export({})  # the dense network in float32
        self._graph = ResizableGraph(self.source, channels.groups)
        self._without = lru_cache(maxsize=2)(self._export_without)
        narrow = {group.name: minimum_width(group, block, "latency") for group in channels.prunable}
        self._is_resizable = _can_run(self._graph.at(narrow), images)
        self.layers = self._graph.layers()

    def at(self, widths: Mapping[str, int]) -> ModelProto:
        """Return the graph at `widths`, in the precision; groups and blocks not named are whole."""
        if not self._is_resizable:
            return in_precision(self._export(widths), self._precision)
        skipped = skipped_in(widths)
        return in_precision((self._without(skipped) if skipped else self._graph).at(widths), self._precision)

    def _export_without(self, skipped: tuple[str, ...]) -> ResizableGraph:
        """Export the network at full widths without these blocks: what is around them takes other operators."""
        return ResizableGraph(self._export({presence(name): 0 for name in skipped}), self._channels.groups)

    def _export(self, widths: Mapping[str, int]) -> ModelProto:
        import onnx

        batch, opset = len(self._images), choose_opset(self._precision, None)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            export_onnx(self._modules.at(widths), self._images[:1], path, opset=opset, batch=(batch, batch, batch))
            proto = onnx.load(path)
        name_nodes_by_module_(proto)
        return proto


def _with_distinct_weights(model: nn.Module) -> nn.Module:
    """Copy a network and add noise to its weights, so that no two tensors are equal.

    An exporter merges equal tensors into one, which cannot be cut in two ways. Times do not depend on the values.
    """
    copied, generator = deep_copy(model).cpu().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            if tensor.is_floating_point():
                tensor += 1e-3 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
    return copied


def _can_run(graph: ModelProto, images: Tensor) -> bool:
    """Test whether ONNX Runtime loads and runs a graph; without it, whether ONNX's own evaluator does."""
    try:
        _run(graph, images)
    except Exception as error:  # ONNX Runtime raises many types; most mean that the graph is not valid
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            raise
        return False
    return True


def _run(graph: ModelProto, images: Tensor) -> None:
    """Run a graph once. ONNX's shape inference is no substitute: it lets a reshape to another size pass."""
    from onnx.reference import ReferenceEvaluator

    feeds = {graph.graph.input[0].name: images.numpy()}
    try:
        session = open_session(graph, threads=1)
    except MissingExtra:  # engines are measured without ONNX Runtime
        ReferenceEvaluator(graph).run(None, feeds)
    else:
        session.run(None, feeds)
