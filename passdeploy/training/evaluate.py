"""Top-1 accuracy and loss of a network on a split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.data.splits import Split
from passdeploy.models.modes import evaluating
from passdeploy.training.deferred import DeferredScalars, StepReport
from passdeploy.training.losses import logits_of
from passdeploy.training.placement import device_of, placed_like

_BATCHES_PER_READ = 1000


@dataclass(frozen=True)
class Accuracy:
    """Accuracy and loss of a classifier on a split."""

    top1: float  # correct / total
    correct: int
    total: int
    loss: float  # mean cross-entropy
    right: Tensor = field(repr=False, compare=False)  # (total,) bool: which images, in the split's order


def evaluate(model: nn.Module, split: Split, *, batch_size: int, device: torch.device | str | None = None) -> Accuracy:
    """Measure top-1 accuracy and mean cross-entropy in evaluation mode, over the whole split in its own order.

    An answer that is not a number is wrong.

    Args:
        model: its mode is restored afterwards.
        split: images and labels.
        batch_size: images per forward pass.
        device: where to evaluate, and where the model is left; None: where it is.
    """
    device = torch.device(device) if device is not None else device_of(model)
    model.to(device)
    meter, deferred = AccuracyMeter(), DeferredScalars(every=_BATCHES_PER_READ)
    right: list[Tensor] = []
    with torch.no_grad(), evaluating(model):
        for number, (images, labels) in enumerate(split.batches(batch_size, device=device)):
            logits, labels = logits_of(model(placed_like(model, images, device))), labels.to(device)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            # the largest of logits that are not numbers would be the first of those
            right.append((logits.argmax(dim=1) == labels) & ~logits.isnan().any(dim=1))
            meter.add_all(deferred.add(number, loss=loss, correct=right[-1].sum(), count=len(labels)))
    meter.add_all(deferred.flush())
    which = torch.cat(right).cpu() if right else torch.zeros(0, dtype=torch.bool)
    return Accuracy(meter.top1, int(meter.correct), meter.total, meter.loss, which)


@dataclass
class AccuracyMeter:
    """Running loss and top-1 accuracy over batches."""

    loss_sum: float = 0.0
    correct: float = 0
    total: int = 0

    def add(self, loss_sum: float, correct: float, count: int) -> None:
        """Add a batch: the sum of its losses, the number of correct predictions, and the number of images."""
        self.loss_sum, self.correct, self.total = self.loss_sum + loss_sum, self.correct + correct, self.total + count

    def add_all(self, reports: Iterable[StepReport]) -> None:
        """Add batches from their values `loss`, `correct` and `count`, as in `add`."""
        for report in reports:
            self.add(report.values["loss"], report.values["correct"], int(report.values["count"]))

    @property
    def loss(self) -> float:
        """Mean over all images so far."""
        return self.loss_sum / max(1, self.total)

    @property
    def top1(self) -> float:
        """Fraction of all images so far that were classified correctly."""
        return self.correct / max(1, self.total)
