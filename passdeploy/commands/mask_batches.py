"""Training batches of mask learning and of the statistics of batch norms after a cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from passdeploy.data.splits import ImageData
from passdeploy.recipe import Recipe
from passdeploy.runtime.seeds import seed_of


@dataclass(frozen=True)
class MaskBatches:
    """Endless batches of training images, changed at random as in fine-tuning, on a device.

    Args:
        recipe: seed, batch size, and random changes and memory format of fine-tuning.
        data: the images.
        device: where the batches go.
        part: of every batch that this process takes: its number, and of how many.
    """

    recipe: Recipe
    data: ImageData
    device: torch.device
    part: tuple[int, int]

    @property
    def size(self) -> int:
        """Images per step, of all processes together."""
        recipe = self.recipe
        return min(recipe.prune.batch_size or recipe.data.batch_size, len(self.data.train))

    def of(self, purpose: str, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) endlessly, from the batch of this number.

        The purpose seeds their order, so it is the same after a resume.
        """
        first_epoch, seen = divmod(first, len(self.data.train) // self.size)
        memory_format = torch.channels_last if self.recipe.finetune.channels_last else torch.contiguous_format
        for epoch in count(first_epoch):
            batches = self.data.train.batches(
                self.size,
                epoch=epoch,
                seed=seed_of(purpose, self.recipe.seed),
                augment=self.recipe.finetune.random_changes,
                drop_last=True,
                part=self.part,
                device=self.device,
                first=seen if epoch == first_epoch else 0,
            )
            for images, labels in batches:
                yield images.to(self.device, memory_format=memory_format), labels.to(self.device)
