"""Export of random networks to ONNX and comparison in ONNX Runtime, shared by tests and benchmarks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passdeploy.export import Parity, check_parity, export_onnx
from tests.random_networks import Network, build, example_input

BATCH = (1, 2, 4)


class OneOutput(nn.Module):
    """A wrapper that flattens all outputs of a network and concatenates them, shape (batch, values)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        leaves = [leaf for leaf in tree_leaves(self.network(images)) if isinstance(leaf, Tensor)]
        return torch.cat([leaf.flatten(1) for leaf in leaves], 1)


def export_and_compare(network: Network, seed: int, folder: Path) -> Parity:
    """Export a network and compare it with PyTorch at every batch size; raises what is wrong."""
    module, images = OneOutput(build(network, seed)), example_input(network, seed, batch=3)
    path = folder / "random.onnx"
    export_onnx(module, images, path, batch=BATCH)
    return check_parity(path, module, images, batch_sizes=BATCH)
