"""Networks resized to any widths, as PyTorch modules or ONNX graphs, and the choice of the sampler that times them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.channels.widths import minimum_width
from passdeploy.errors import UsageError
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.export.ort_session import open_session
from passdeploy.latency.measurement_context import block_of
from passdeploy.latency.network_timing import LatencySampler
from passdeploy.latency.onnx_resizing import ResizableGraph
from passdeploy.latency.ort_sampler import OrtSampler
from passdeploy.latency.torch_sampler import TorchSampler
from passdeploy.profiling.execution import Setting
from passdeploy.slimming.slim import slim

if TYPE_CHECKING:
    from onnx import ModelProto

TABLE_BACKENDS = ("ort", "torch", "compile")


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
        backend: `ort`, on the CPU, or `torch` or `compile`, on any device.
        model: the dense network; it is not changed.
        channels: its groups.
        images: the batch that is timed, shape (batch, 3, height, width).
        threads: of the backend, on a CPU.
        setting: device, precision and memory layout of PyTorch.

    Raises:
        UsageError: no table can be measured on this backend, or not with this setting.
        MissingError: this machine lacks the device.
    """
    setting = setting or Setting()
    require_table_support(backend, setting)
    setting.require_possible((backend,))
    if backend == "ort":
        graphs = OnnxNetworks(model, channels, images)
        return OrtSampler(graphs.at, images, threads=threads, block=block_of("ort"), layers=graphs.layers)
    networks, block = SlimNetworks(model, channels), block_of(backend, setting)
    return TorchSampler(networks.at, images, threads=threads, block=block, backend=backend, setting=setting)


def require_table_support(backend: str, setting: Setting) -> None:
    """Raise UsageError where no table can be measured with this backend and setting, on any machine."""
    if backend not in TABLE_BACKENDS:
        raise UsageError(
            f"no latency table can be measured on {backend} in this version: choose from {', '.join(TABLE_BACKENDS)}.\n"
            "Ask for macs, export, and measure with: passdeploy profile"
        )
    if backend == "ort" and setting != Setting():
        raise UsageError(
            "ONNX Runtime's latency tables are of the CPU in fp32 in this version.\n"
            "For another device, precision or layout choose the backend torch or compile."
        )


class SlimNetworks:
    """PyTorch modules at any widths; the first channels of every group stay."""

    def __init__(self, model: nn.Module, channels: ChannelMap) -> None:
        self._model, self._channels = copy.deepcopy(model).cpu().eval(), channels

    def at(self, widths: Mapping[str, int]) -> nn.Module:
        """Cut a copy of the network to `widths`; groups not named stay whole."""
        return slim(self._model, self._channels.groups, Plan({name: tuple(range(n)) for name, n in widths.items()}))


class OnnxNetworks:
    """ONNX graphs at any widths: exported once and cut, or exported each time where the graph cannot be cut."""

    def __init__(self, model: nn.Module, channels: ChannelMap, images: Tensor) -> None:
        self._images, self._modules = images, SlimNetworks(_with_distinct_weights(model), channels)
        self._graph = ResizableGraph(self._export({}), channels.groups)
        narrow = {group.name: minimum_width(group, block_of("ort"), "latency") for group in channels.prunable}
        self._is_resizable = _can_run(self._graph.at(narrow), images)
        self.layers = self._graph.layers()

    def at(self, widths: Mapping[str, int]) -> ModelProto:
        """Return the graph at `widths`; groups not named are whole."""
        return self._graph.at(widths) if self._is_resizable else self._export(widths)

    def _export(self, widths: Mapping[str, int]) -> ModelProto:
        import onnx

        batch = len(self._images)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            export_onnx(self._modules.at(widths), self._images[:1], path, batch=(batch, batch, batch))
            return onnx.load(path)


def _with_distinct_weights(model: nn.Module) -> nn.Module:
    """Copy a network and add noise to its weights, so that no two tensors are equal.

    An exporter merges equal tensors into one, which cannot be cut in two ways. Times do not depend on the values.
    """
    copied, generator = copy.deepcopy(model).cpu().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            if tensor.is_floating_point():
                tensor += 1e-3 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
    return copied


def _can_run(graph: ModelProto, images: Tensor) -> bool:
    """Test whether ONNX Runtime loads and runs a graph."""
    try:
        session = open_session(graph, threads=1)
        session.run(None, {session.get_inputs()[0].name: images.numpy()})
    except Exception:  # ONNX Runtime raises many types; each means that the graph is not valid
        return False
    return True
