"""Example of pruning inside your own training loop: find groups, learn masks, cut, and continue training.

python examples/own_loop.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import passdeploy as pd
from passdeploy.sparsity.settings import PassSettings


def colours(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw noisy images of 32 pixels; the class is the colour channel that is bright in one quarter of the image."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (batch,), generator=generator)
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    images[torch.arange(batch), labels, :16, :16] += 0.5
    return images, labels


def train_epoch_(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Train for one epoch and return the mean loss."""
    total = 0.0
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item() / len(batches)
    return total


def main() -> None:
    """Train half of the epochs dense, prune, and train the other half slim."""
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
            optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)  # the slim network has new parameters
        loss = train_epoch_(model, optimizer, batches)
        print(f"epoch {epoch}: loss {loss:.3f}, {pd.count(model.eval(), batches[0][0][:1]).macs:,} multiply-adds")
        model.train()


if __name__ == "__main__":
    main()
