"""Example of pruning a detector of torchvision: FCOS on drawn squares and circles, trained in a plain loop.

    python examples/torchvision_detection.py

Detectors of torchvision compute their losses themselves, in training mode. `pd.BatchLoss` lets them.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

import passdeploy as pd
from passdeploy.sparsity.settings import PassSettings

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
SIZE = 64


def shapes(batch: int, seed: int) -> Batch:
    """Draw images with a bright square (class 0) or disc (class 1) each, and the box around it."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.rand(batch, 3, SIZE, SIZE, generator=generator)
    targets = []
    for image in images:
        kind, width = (
            int(torch.randint(2, (), generator=generator)),
            int(torch.randint(16, 32, (), generator=generator)),
        )
        left, top = torch.randint(SIZE - width, (2,), generator=generator).tolist()
        rows, columns = torch.arange(width).view(-1, 1), torch.arange(width)
        disc = (rows - width / 2) ** 2 + (columns - width / 2) ** 2 < (width / 2) ** 2
        image[kind, top : top + width, left : left + width] += 0.7 * (disc if kind else torch.ones(width, width))
        box = torch.tensor([[left, top, left + width, top + width]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.tensor([kind])})
    return list(images), targets


def detector() -> nn.Module:
    """Build FCOS on a backbone of four convolutions, with a stride of 8."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    backbone = nn.Sequential(*layers)
    backbone.out_channels = 64  # which torchvision asks for
    anchors = AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),))
    return FCOS(backbone, num_classes=2, anchor_generator=anchors, min_size=SIZE, max_size=SIZE)


def loss(network: nn.Module, batch: Batch) -> Tensor:
    """Compute the sum of the detector's own losses."""
    images, targets = batch
    losses: dict[str, Tensor] = network(images, targets)
    return torch.stack(list(losses.values())).sum()


def train_(network: nn.Module, batches: list[Batch], steps: int) -> None:
    """Train for a number of steps; used for the dense and for the slim detector."""
    optimizer = torch.optim.AdamW(network.parameters(), 0.002)
    network.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(network, batches[step % len(batches)]).backward()
        optimizer.step()
    network.eval()


@torch.no_grad()
def share_found(network: nn.Module, batches: list[Batch]) -> float:
    """Compute the share of the shapes whose best detection has the right class and overlaps by half."""
    found = total = 0
    for images, targets in batches:
        for result, target in zip(network(images), targets, strict=True):
            total += 1
            if len(result["boxes"]):
                (left, top), (right, bottom) = result["boxes"][0].view(2, 2)
                (x, y), (x2, y2) = target["boxes"][0].view(2, 2)
                shared = (right.min(x2) - left.max(x)).clamp_min(0) * (bottom.min(y2) - top.max(y)).clamp_min(0)
                union = (right - left) * (bottom - top) + (x2 - x) * (y2 - y) - shared
                found += int(bool(shared > union / 2) and result["labels"][0] == target["labels"][0])
    return found / total


def main() -> None:
    """Train the detector, prune it to half of its multiply-adds, and train the slim one in the same loop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of training, and half as many of mask learning")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    batches, unseen = [shapes(8, seed) for seed in range(16)], [shapes(8, 1000 + seed) for seed in range(8)]
    dense = detector()
    train_(dense, batches, steps)
    result = pd.prune(
        dense,
        batches,
        pd.BatchLoss(loss),
        target={"macs": 0.5},
        finetune=lambda network: train_(network, batches, steps),
        example_inputs=(unseen[0][0][:1],),  # one argument: a list of images
        settings=PassSettings(steps=max(1, steps // 2), prompt_kind="none"),
    )
    result.save("slim-fcos.safetensors")
    again = pd.rebuild(detector().eval(), "slim-fcos.safetensors")
    print(result)
    print(f"shapes found: dense {share_found(dense, unseen):.1%}, slim {share_found(again, unseen):.1%}")


if __name__ == "__main__":
    main()
