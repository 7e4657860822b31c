"""One forward and backward pass of two images before the work begins: what would break later is said in a sentence.

The pass runs on a copy, on the run's device, in the memory order, precision and compile setting of each training that
the recipe asks for; of one image, where batches are no larger. Where it fails, it is tried again without one of these,
so that the advice is one that works.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.data.splits import ImageData
from passdeploy.errors import ModelError, PassDeployError, clipped, first_line, percent
from passdeploy.models.cloning import deep_copy
from passdeploy.models.diagnosis import mismatch_of
from passdeploy.models.modes import evaluating
from passdeploy.recipe import Recipe, TrainSpec
from passdeploy.runtime.determinism import deterministic_algorithms
from passdeploy.runtime.device_memory import is_out_of_memory, memory_errors
from passdeploy.runtime.devices import find_device
from passdeploy.runtime.events import Listener, Warned, silent
from passdeploy.runtime.seeds import generator
from passdeploy.training.losses import logits_of
from passdeploy.training.placement import channels_last_inside, placed_like

AGREEMENT = 1e-2  # largest relative difference between the answers for a sample alone and in a batch
TRIAL_IMAGES = 2  # the fewest that batch norm takes in training
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Conditions:
    """Conditions that a training step of a recipe runs under."""

    channels_last: bool
    precision: str
    compile: bool

    @classmethod
    def of(cls, spec: TrainSpec) -> _Conditions:
        return cls(spec.channels_last, spec.precision, spec.compile)

    @property
    def text(self) -> str:
        order = "channels-last" if self.channels_last else "contiguous"
        return f"{order}, {self.precision}{', compiled' if self.compile else ''}"

    def simpler(self) -> list[tuple[str, _Conditions]]:
        """List simpler conditions, each with the key of the recipe that sets them."""
        found = []
        if self.compile:
            found.append(("compile: false", replace(self, compile=False)))
        if self.channels_last:
            found.append(("channels_last: false", replace(self, channels_last=False)))
        if self.precision != "fp32":
            found.append(("precision: fp32", replace(self, precision="fp32")))
        return found


def try_training(
    dense: nn.Module,
    recipe: Recipe,
    data: ImageData,
    *,
    is_trained: bool,
    device: str = "auto",
    listener: Listener = silent,
) -> None:
    """Run two images forward and backward through a copy of the network, as each training of the recipe will.

    Warns if the answer for a sample depends on the others of its batch, and if answers are probabilities.

    Args:
        dense: the network; it is left as it was.
        recipe: that says how to train.
        data: for the shape of images and the number of classes; no image is read.
        is_trained: the dense network needs no training.
        device: of the run.
        listener: receives the warnings.

    Raises:
        ModelError: the network cannot be trained like this; the message says what to change.
    """
    name, target = recipe.model.name, find_device(device)
    trainings: dict[str, TrainSpec] = {}
    if not is_trained and recipe.train.epochs:
        trainings["train"] = recipe.train
    if recipe.finetune.epochs:
        trainings["finetune"] = recipe.finetune
    if trainings and not any(parameter.requires_grad for parameter in dense.parameters()):
        raise ModelError(
            f"all parameters of {name} are frozen (requires_grad is False), so {' and '.join(trainings)} could not "
            "change them.\nLeave them trainable, or set the epochs of these to 0."
        )
    images = torch.randn(TRIAL_IMAGES, *data.image_shape, generator=generator("try", 0))
    _warn_of_answers(dense, images, name, listener)
    batches = (recipe.data.batch_size, recipe.prune.batch_size or TRIAL_IMAGES, len(data.train))
    trial = _Trial(dense, images[: min(TRIAL_IMAGES, *batches)], data.num_classes, target, recipe.deterministic)
    tried = set[_Conditions]()
    with memory_errors(lambda: f"training {name} on two images", target, advice="Take a smaller network or images."):
        for section, spec in trainings.items():
            conditions = _Conditions.of(spec)
            if conditions in tried:
                continue
            tried.add(conditions)
            if (error := trial.failure(conditions)) is not None:
                _refuse(trial, conditions, section, name, error, two_images=images)
    if any(conditions.compile for conditions in tried):
        # compiled code is cached by the code of `forward`: what is compiled later must not depend on this batch of two
        torch._dynamo.reset()


@dataclass(frozen=True)
class _Trial:
    """A training step on a copy of the network, of two images, or of one where batches are no larger."""

    dense: nn.Module
    images: Tensor
    num_classes: int
    device: torch.device
    is_deterministic: bool

    def failure(self, conditions: _Conditions) -> Exception | None:
        """Run the step; return the error that it ends with.

        Raises:
            PassDeployError: an error that explains itself.
        """
        try:
            network = deep_copy(self.dense).to(self.device)
            with (
                deterministic_algorithms(self.is_deterministic, self.device, network=network),
                evaluating(network, training=True),
                channels_last_inside(network, conditions.channels_last),
                torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
            ):
                self._step(network, conditions)
        except PassDeployError:
            raise
        except Exception as error:  # a user's network may raise anything
            if is_out_of_memory(error):
                raise
            return error
        return None

    def _step(self, network: nn.Module, conditions: _Conditions) -> None:
        images, autocast = placed_like(network, self.images, self.device), _AUTOCAST[conditions.precision]
        forward: Any = torch.compile(network) if conditions.compile else network
        with torch.autocast(self.device.type, autocast) if autocast else nullcontext():
            logits = logits_of(forward(images))
            if logits.shape != (len(images), self.num_classes):
                raise ValueError(
                    f"in training mode it answers with shape {tuple(logits.shape)}, not with one score for each of "
                    f"{self.num_classes} classes"
                )
        labels = torch.arange(len(images), device=self.device) % self.num_classes
        F.cross_entropy(logits.float(), labels).backward()


def _refuse(
    trial: _Trial, conditions: _Conditions, section: str, name: str, error: Exception, *, two_images: Tensor
) -> None:
    if (problem := mismatch_of(trial.dense, error)) is not None:
        raise ModelError(f"{name} {problem}") from error
    advice = "Run a forward and a backward pass of two images in training mode to see where."
    for key, simpler in conditions.simpler():
        if trial.failure(simpler) is None:
            advice = f"It works with {section}: {{{key}}}."
            break
    if len(trial.images) == 1 and replace(trial, images=two_images).failure(conditions) is None:
        advice = "It works with two images: set data.batch_size, and prune.batch_size, to at least 2."
    reason = f"{type(error).__name__}: {clipped(first_line(error, longest=None), 200)}"
    raise ModelError(f"{name} cannot be trained ({section}, {conditions.text}): {reason}.\n{advice}") from error


def _warn_of_answers(dense: nn.Module, images: Tensor, name: str, listener: Listener) -> None:
    """Warn if the answer for a sample depends on its neighbours in the batch, and if answers are probabilities.

    Raises:
        ModelError: the network does not take two images at once, gives one answer for both, or answers with NaN.
    """
    with torch.no_grad(), evaluating(dense):
        alone = logits_of(dense(images[:1])).float()
        try:
            both = logits_of(dense(images)).float()
        except Exception as error:  # a user's network may raise anything
            reason = f"{type(error).__name__}: {clipped(first_line(error, longest=None), 200)}"
            raise ModelError(
                f"{name} takes one image, but not two at once: {reason}.\n"
                "Let its forward read the batch size from its input, such as x.shape[0]."
            ) from error
    if both.shape != (2, *alone.shape[1:]):
        raise ModelError(
            f"{name} answers with shape {tuple(alone.shape)} for one image and {tuple(both.shape)} for two.\n"
            "Let its forward read the batch size from its input, such as x.shape[0]."
        )
    if not both.isfinite().all():
        raise ModelError(f"{name} answers with NaN or infinite values to noise.\nAre its weights whole?")
    difference = float((both[:1] - alone).abs().max() / both.abs().max().clamp_min(1e-12))
    if not difference <= AGREEMENT:
        listener(
            Warned(
                f"{name} answers differently for a sample alone and in a batch (by {percent(difference, 0)} of the "
                f"largest answer){_batch_layers(dense)}: accuracy and exported files then depend on the batch size."
            )
        )
    if both.ndim == 2 and both.shape[1] > 1 and bool((both >= 0).all() and ((both.sum(1) - 1).abs() < 1e-3).all()):
        listener(
            Warned(
                f"{name} seems to answer with probabilities, which add up to 1: the loss expects logits, and trains "
                "slowly on these. Leave the last softmax out."
            )
        )


def _batch_layers(model: nn.Module) -> str:
    names: Sequence[str] = [
        layer_name
        for layer_name, layer in model.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not layer.track_running_stats
    ]
    return f", as {names[0]} does, which has no running statistics" if names else ""
