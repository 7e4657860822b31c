"""Training losses: cross-entropy, distillation from a teacher, and both on mixed images with mixed labels.

Sources: knowledge distillation, Hinton, Vinyals and Dean (arXiv:1503.02531); mixup, Zhang et al. (arXiv:1710.09412);
CutMix, Yun et al. (arXiv:1905.04899).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.errors import ModelError
from passdeploy.training.mixing import MixedLabels

if TYPE_CHECKING:
    from passdeploy.recipe import DistillSpec


@dataclass(frozen=True)
class TrainingLoss:
    """Cross-entropy with the labels and, if there is a teacher, distillation from its logits."""

    label_smoothing: float = 0.0
    teacher: nn.Module | None = None
    distill: DistillSpec | None = None

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor | MixedLabels) -> Tensor:
        """Compute the scalar to minimise.

        Args:
            logits: of the student, (batch, classes).
            images: the student's inputs; the teacher gets the same.
            labels: (batch,) class indices, or those of mixed images.
        """
        label_loss = self._label_loss(logits, labels)
        if self.teacher is None or self.distill is None:
            return label_loss
        spec = self.distill
        distillation = DistillationLoss(self.teacher, spec.alpha, spec.temperature, spec.only_better)
        per_image = partial(self._label_loss, labels=labels, reduction="none")
        return distillation.loss(label_loss, logits, images, per_image)

    def _label_loss(self, logits: Tensor, labels: Tensor | MixedLabels, *, reduction: str = "mean") -> Tensor:
        """Compute the cross-entropy: its mean over the batch, or (`none`) one value per image, (batch,)."""
        if isinstance(labels, MixedLabels):
            parts = (labels.labels, labels.others)
            first, other = (self._label_loss(logits, part, reduction=reduction) for part in parts)
            return labels.share * first + (1 - labels.share) * other
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction=reduction)


@dataclass(frozen=True)
class DistillationLoss:
    """Weighted sum of a loss from the labels and the divergence from a teacher's softened outputs."""

    teacher: nn.Module  # a classifier, in evaluation mode
    alpha: float = 0.5  # weight of the divergence; the loss from the labels has the rest
    temperature: float = 4.0  # divides the logits of both networks before they are compared
    only_better: bool = False  # distil only images on which the teacher's cross-entropy is below the student's

    def loss(self, label_loss: Tensor, logits: Tensor, images: Tensor, per_image: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute `(1 - alpha) * label_loss + alpha * divergence`.

        Args:
            label_loss: the loss from the labels, a scalar.
            logits: of the student, (batch, classes).
            images: the student's inputs; the teacher gets the same.
            per_image: logits -> their loss from the labels, one value per image, (batch,). With `only_better` it
                decides which images are distilled, and takes the place of the divergence for all others.
        """
        with torch.no_grad():
            teacher_logits = logits_of(self.teacher(images))
        # soft gradients shrink with the square of the temperature (Hinton et al., section 2)
        student, teacher = (F.log_softmax(scores / self.temperature, dim=1) for scores in (logits, teacher_logits))
        divergences = self.temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        if self.only_better:
            student_loss, teacher_loss = per_image(logits), per_image(teacher_logits)
            divergences = torch.where(teacher_loss < student_loss.detach(), divergences, student_loss)
        return (1 - self.alpha) * label_loss + self.alpha * divergences.mean()

    def loss_of_output(self, label_loss: Tensor, output: Any, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the same from what a network returned and class indices (batch,)."""
        per_image = partial(F.cross_entropy, target=labels, reduction="none")
        return self.loss(label_loss, logits_of(output), images, per_image)


def logits_of(output: Any) -> Tensor:
    """Return the logits (batch, classes) of a network's output.

    Those are the output itself, the first of several (GoogLeNet and Inception return more after them), or what a
    dictionary or an object holds as `logits`; of a dictionary with a single tensor, that tensor.

    Raises:
        ModelError: none of these is a tensor.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        logits = output.get("logits", tensors[0] if len(tensors) == 1 else None)
        what = f"{type(output).__name__} of {', '.join(map(str, output)) or 'nothing'}"
    else:
        first = output[0] if isinstance(output, tuple | list) and output else None
        logits = getattr(output, "logits", first)
        what = type(output).__name__
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"the network answers with a {what}, in which no tensor is called 'logits'.\n"
            "Let it return the logits (images, classes) alone, first in a tuple, or as 'logits' in a dictionary."
        )
    return logits
