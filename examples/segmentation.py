"""Example of pruning a segmentation network: torchvision's LRASPP on drawn shapes.

    python examples/segmentation.py

`pd.learn_masks` is not limited to classifiers: it takes any batches and any differentiable loss.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import passdeploy as pd
from passdeploy.sparsity.settings import PassSettings

Batch = tuple[Tensor, Tensor]


def shapes(batch: int, seed: int, size: int = 64) -> Batch:
    """Draw noisy images with one bright disc (class 1) or square (class 2) each.

    Returns:
        Images, shape (batch, 3, size, size), and the class of every pixel, shape (batch, size, size); 0: background.
    """
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(batch, 3, size, size, generator=generator)
    kinds = torch.randint(1, 3, (batch,), generator=generator)
    centres = torch.randint(size // 4, 3 * size // 4, (batch, 2, 1, 1), generator=generator)
    rows, columns = torch.arange(size).view(-1, 1), torch.arange(size)
    offsets = torch.broadcast_tensors(rows - centres[:, 0], columns - centres[:, 1])
    distances = torch.stack(offsets).abs().float()  # (2, batch, size, size)
    radius = size // 6
    inside = torch.where((kinds == 1).view(-1, 1, 1), distances.norm(dim=0) < radius, distances.amax(0) < radius)
    return images + inside[:, None], inside.long() * kinds.view(-1, 1, 1)


def loss(output: dict[str, Tensor], truth: Tensor) -> Tensor:
    """Compute the cross-entropy over pixels, with a low weight for the background; LRASPP returns a dictionary."""
    return F.cross_entropy(output["out"], truth, weight=torch.tensor([0.1, 1.0, 1.0]))


def train_(network: nn.Module, batches: list[Batch], steps: int) -> None:
    """Train for a number of steps; used for the dense and for the slim network."""
    optimizer = torch.optim.AdamW(network.parameters(), 0.002)
    network.train()
    for step in range(steps):
        images, truth = batches[step % len(batches)]
        optimizer.zero_grad()
        loss(network(images), truth).backward()
        optimizer.step()
    network.eval()


def accuracy(network: nn.Module, batches: list[Batch]) -> float:
    """Compute the share of the pixels on shapes whose class is right."""
    right = total = 0
    with torch.no_grad():
        for images, truth in batches:
            on_shape = truth > 0
            right += int((network(images)["out"].argmax(1) == truth)[on_shape].sum())
            total += int(on_shape.sum())
    return right / total


def main() -> None:
    """Train, learn masks, cut, check, fine-tune."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of training, and half as many of mask learning")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    network = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=3)
    batches = [shapes(8, seed) for seed in range(16)]
    unseen = [shapes(8, 1000 + seed) for seed in range(4)]
    train_(network, batches, steps)
    groups = pd.find_groups(network, batches[0][0][:1])
    learned = pd.learn_masks(
        network,
        groups,
        batches,
        loss,
        budget={"macs": 0.6},
        settings=PassSettings(steps=max(1, steps // 2), prompt_kind="none"),
    )
    small = pd.slim(network, groups, learned.plan)
    error = pd.verify(network, groups, learned.plan, batches[0][0], tolerance=1e-5)
    before, cut = accuracy(network, unseen), accuracy(small, unseen)
    train_(small, batches, steps)
    macs = [pd.count(model, batches[0][0][:1]).macs for model in (network, small)]
    print(f"multiply-adds {macs[0]:,} -> {macs[1]:,}, equal to the masked network to {error:.0e}")
    print(f"pixels right: dense {before:.1%}, cut {cut:.1%}, fine-tuned {accuracy(small, unseen):.1%}")


if __name__ == "__main__":
    main()
