"""Example of pruning a Hugging Face model in its Trainer: a small SegFormer on drawn squares and circles.

    pip install transformers accelerate
    python examples/hf_segformer.py

A model with trained weights comes from `SegformerForSemanticSegmentation.from_pretrained(...)` instead.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments

import passdeploy as pd
from passdeploy.trainers.hugging_face import prune_in_trainer

SIZE = 64
CONFIG = SegformerConfig(
    hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], decoder_hidden_size=64, num_labels=3, drop_path_rate=0.0
)


class Shapes(Dataset[dict[str, Tensor]]):
    """Noisy images with one square (class 1) or disc (class 2) each, and the class of every pixel."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed

    def __len__(self) -> int:
        """Return the number of images."""
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Draw one image, always the same for an index."""
        generator = torch.Generator().manual_seed(1000 * self._seed + index)
        image, kind, radius = 0.3 * torch.randn(3, SIZE, SIZE, generator=generator), index % 2 + 1, SIZE // 5
        row, column = torch.randint(radius, SIZE - radius, (2,), generator=generator)
        offsets = torch.stack(torch.meshgrid(torch.arange(SIZE) - row, torch.arange(SIZE) - column, indexing="ij"))
        inside = offsets.abs().amax(0) < radius if kind == 1 else offsets.float().norm(dim=0) < radius
        return {"pixel_values": image + inside, "labels": inside.long() * kind}


def make_trainer(model: nn.Module, steps: int) -> Trainer:
    """Make the Trainer of a model; the slim one gets its own."""
    arguments = TrainingArguments(
        "segformer-shapes",
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=0.002,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model, arguments, train_dataset=Shapes(128, seed=0))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Compute the share of the pixels on shapes whose class is right, on images that no model has seen."""
    device, unseen, right, total = next(model.parameters()).device, Shapes(32, seed=1), 0, 0
    for index in range(len(unseen)):
        example = unseen[index]
        logits = model(example["pixel_values"][None].to(device)).logits
        found = nn.functional.interpolate(logits, (SIZE, SIZE), mode="bilinear")[0].argmax(0).cpu()
        on_shape = example["labels"] > 0
        right += int((found == example["labels"])[on_shape].sum())
        total += int(on_shape.sum())
    return right / total


def main() -> None:
    """Train a SegFormer, prune it to half of its multiply-adds, train the slim one, and load it again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of training, and half as many of mask learning")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    dense = SegformerForSemanticSegmentation(CONFIG)
    make_trainer(dense, steps).train()
    dense.eval()
    result = prune_in_trainer(
        dense,
        lambda model: make_trainer(model, steps),
        target={"macs": 0.5},
        steps=max(1, steps // 2),
        save="slim-segformer.safetensors",
    )
    again = pd.rebuild(SegformerForSemanticSegmentation(CONFIG).eval(), "slim-segformer.safetensors")
    print(result)
    print(f"pixels right: dense {accuracy(dense):.1%}, slim {accuracy(again):.1%}")


if __name__ == "__main__":
    main()
