"""Latency of a made-up machine on which every layer costs a fixed launch, as on a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelMap
from passdeploy.latency.network_timing import NetworkTiming
from passdeploy.latency.resized_networks import SlimNetworks
from passdeploy.profiling.clock import HostClock
from passdeploy.profiling.kernel_times import NodeTime
from passdeploy.profiling.runners import TorchRunner

ROUND_TO = 8


class LaunchSampler:
    """Latency sampler that measures nothing: a layer takes a launch, and time in proportion to its multiply-adds.

    Args:
        model: the dense network.
        channels: its groups and blocks.
        images: that it takes.
        launch: share of all launches in the dense network's latency, which is 1 ms.
    """

    backend, block = "made-up", ROUND_TO

    def __init__(self, model: nn.Module, channels: ChannelMap, images: Tensor, launch: float) -> None:
        self.clock, self._networks, self._images = HostClock(), SlimNetworks(model, channels), images
        self._launch_ms, self._macs_ms = 0.0, 0.0
        layers = self._layers({})
        self._launch_ms = launch / len(layers)
        self._macs_ms = (1 - launch) / sum(macs for *_, macs in layers)

    def measure(self, widths: Mapping[str, int], *, seconds: float) -> NetworkTiming:
        """Return the times of the network at `widths`."""
        nodes = tuple(
            NodeTime(f"{name}/{kind}.0", kind, shapes, 2, self._launch_ms + self._macs_ms * macs)
            for name, kind, shapes, macs in self._layers(widths)
        )
        return NetworkTiming(dict(widths), sum(node.ms for node in nodes), nodes)

    def runner(self, widths: Mapping[str, int], name: str) -> TorchRunner:
        """Load the network; only the baseline times of the machine are taken with it, which change no table."""
        runner = TorchRunner(name, self._networks.at(widths))
        runner.prepare(self._images)
        return runner

    def _layers(self, widths: Mapping[str, int]) -> list[tuple[str, str, tuple[tuple[int, ...], ...], int]]:
        """List (name, kind, shapes of input, weight and output, multiply-adds) of the layers with a weight."""
        network, found = self._networks.at(widths), list[tuple[str, str, tuple[tuple[int, ...], ...], int]]()

        def record(name: str, layer: nn.Conv2d | nn.Linear, given: tuple[Tensor, ...], output: Tensor) -> None:
            macs = layer.weight[0].numel() * output.numel()
            shapes = tuple(given[0].shape), tuple(layer.weight.shape), tuple(output.shape)
            found.append((name, type(layer).__name__, shapes, macs))

        for name, module in network.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(lambda layer, given, out, name=name: record(name, layer, given, out))
        with torch.no_grad():
            network.eval()(self._images)
        return found
