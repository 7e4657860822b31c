"""Cut ONNX graphs compute what the cut network computes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from passdeploy.errors import MissingExtra
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.export.ort_session import open_session
from passdeploy.grouping.find import map_channels
from passdeploy.latency import resized_networks
from passdeploy.latency.onnx_resizing import ResizableGraph
from passdeploy.latency.resized_networks import OnnxNetworks, SlimNetworks, _with_distinct_weights
from tests.nets import Concatenated, Plain

pytest.importorskip("onnxruntime", reason="extra cpu is not installed")

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Depthwise(nn.Module):
    """Inverted bottleneck: the depthwise convolution's number of groups follows its width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 24, 1)
        self.depthwise, self.narrow = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.narrow(self.depthwise(self.wide(x).relu()).relu())
        return self.fc(x.mean((2, 3)))


class Shuffled(nn.Module):
    """Channel shuffle: the exported reshape holds the dense width as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x.view(x.size(0), 2, x.size(1) // 2, x.size(2), x.size(3)).transpose(1, 2).flatten(1, 2)
        return self.fc(self.second(x).mean((2, 3)))


@pytest.mark.parametrize("make", [Plain, Concatenated, Depthwise])
def test_a_cut_graph_computes_what_the_cut_network_does(make: type[nn.Module], tmp_path: Path):
    torch.manual_seed(0)
    net = _with_distinct_weights(make().eval())
    channels = map_channels(net, IMAGES[:1])
    export_onnx(net, IMAGES[:1], tmp_path / "dense.onnx", batch=(2, 2, 2))
    graph = ResizableGraph(onnx.load(tmp_path / "dense.onnx"), channels.groups)
    widths = {group.name: max(1, group.width // 2) for group in channels.prunable}
    (outputs,) = open_session(graph.at(widths), threads=1).run(None, {"images": IMAGES.numpy()})
    with torch.no_grad():
        expected = SlimNetworks(net, channels).at(widths)(IMAGES)
    assert torch.allclose(torch.from_numpy(outputs), expected, atol=1e-5)


def test_a_graph_that_cannot_be_cut_is_exported_each_time():
    torch.manual_seed(0)
    net = Shuffled().eval()
    channels = map_channels(net, IMAGES[:1])
    networks = OnnxNetworks(net, channels, IMAGES)
    assert not networks._is_resizable
    widths = {group.name: group.width // 2 for group in channels.prunable}
    (outputs,) = open_session(networks.at(widths), threads=1).run(None, {"images": IMAGES.numpy()})
    assert outputs.shape == (2, 5)


@pytest.mark.parametrize(("make", "is_resizable"), [(Plain, True), (Depthwise, True), (Shuffled, False)])
def test_without_onnx_runtime_the_same_graphs_are_cut(
    make: type[nn.Module], is_resizable: bool, monkeypatch: pytest.MonkeyPatch
):
    def missing(*_: object, **__: object) -> None:
        raise MissingExtra("onnxruntime", "cpu")

    monkeypatch.setattr(resized_networks, "open_session", missing)
    net = make().eval()
    assert OnnxNetworks(net, map_channels(net, IMAGES[:1]), IMAGES)._is_resizable == is_resizable


@pytest.mark.parametrize("error", [RuntimeError("Failed to allocate memory for requested buffer"), MemoryError()])
def test_a_graph_that_does_not_fit_into_memory_is_not_taken_for_one_that_cannot_be_cut(
    error: Exception, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(resized_networks, "open_session", full)
    net = Plain().eval()
    with pytest.raises(type(error)):
        OnnxNetworks(net, map_channels(net, IMAGES[:1]), IMAGES)


def test_equal_weights_are_made_distinct_before_the_export_and_the_network_is_not_changed():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    copied = _with_distinct_weights(net)
    assert not torch.equal(copied[0].weight, copied[1].weight)
    assert torch.equal(net[0].weight, torch.ones(4))
