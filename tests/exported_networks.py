"""Random networks through ONNX and ONNX Runtime: the judge that the tests and the benchmark share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passdeploy.export import Parity, check_parity, export_onnx
from tests.random_networks import Network, build, example_input

BATCH = (1, 2, 4)


class OneOutput(nn.Module):
    """A network whose outputs, however many and of whatever shape, are one row for each image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        leaves = [leaf for leaf in tree_leaves(self.network(images)) if isinstance(leaf, Tensor)]
        return torch.cat([leaf.flatten(1) for leaf in leaves], 1)


def export_and_compare(network: Network, seed: int, folder: Path) -> Parity:
    """Export the network and compare it at every batch size; an exception says what is wrong."""
    module, images = OneOutput(build(network, seed)), example_input(network, seed, batch=3)
    path = folder / "random.onnx"
    export_onnx(module, images, path, batch=BATCH)
    return check_parity(path, module, images, batch_sizes=BATCH)
