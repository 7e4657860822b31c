"""Prune inside a training loop of one's own: find groups, learn masks, cut, and go on training.

python examples/own_loop.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import passdeploy as pd
from passdeploy.sparsity.learn import PassSettings


def colours(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images of 32 pixels whose class is the colour channel that is bright in one quarter."""
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (batch,), generator=chance)
    images = torch.randn(batch, 3, 32, 32, generator=chance)
    images[torch.arange(batch), labels, :16, :16] += 0.5
    return images, labels


def epoch_(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> float:
    """One pass; returns the mean loss."""
    total = 0.0
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item() / len(batches)
    return total


def main() -> None:
    """Half of the epochs dense, half of them slim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet18(num_classes=3)
    batches = [colours(32, seed) for seed in range(8)]
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for epoch in range(epochs):
        if epoch == epochs // 2:
            groups = pd.find_groups(model, batches[0][0][:1])
            settings = PassSettings(steps=8, prompt_kind="none")
            learned = pd.learn_masks(model, groups, batches, F.cross_entropy, budget={"macs": 0.5}, settings=settings)
            model = pd.slim(model, groups, learned.plan)
            optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)  # its parameters are new ones
        loss = epoch_(model, optimizer, batches)
        print(f"epoch {epoch}: loss {loss:.3f}, {pd.count(model.eval(), batches[0][0][:1]).macs:,} multiply-adds")
        model.train()


if __name__ == "__main__":
    main()
