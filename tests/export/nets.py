"""Small networks and hand-made ONNX graphs for the export tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn


class SmallNet(nn.Module):
    """A small MobileNetV2: a stem, an inverted residual with a depthwise convolution, dropout and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.block = nn.Sequential(
            nn.Conv2d(8, 16, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            nn.Conv2d(16, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 5))

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        features = features + self.block(features)
        return self.head(features.mean((2, 3)))


def small_net(seed: int = 0) -> SmallNet:
    """Build the network with batch-norm statistics that are not the identity, so that folding them matters."""
    torch.manual_seed(seed)
    net = SmallNet()
    for _ in range(3):
        net(torch.randn(8, 3, 16, 16) * 2 + 1)
    return net.eval()


def write_graph(
    path: Path,
    nodes: Sequence[NodeProto],
    weights: Mapping[str, object] | None = None,
    *,
    shape: Sequence[int | str] = ("batch", 3, 8, 8),
    domains: Sequence[str] = (),
) -> Path:
    """Write an ONNX graph from "images" to "logits", both of `shape`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 20), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def node(kind: str, *inputs: str, output: str = "logits", **attributes: object) -> NodeProto:
    """Make a node with a name made of its operator and its output."""
    return helper.make_node(kind, list(inputs), [output], name=f"{kind}-{output}", **attributes)
