"""Training state that checkpoints save and resume: weights, optimiser, scaler, weight average and history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.training.evaluate import AccuracyMeter
from passdeploy.training.optimizers import WeightAverage, load_optimizer_tensors_, optimizer_tensors
from passdeploy.training.saving import named, prefixed, require_same_settings


@dataclass(frozen=True)
class Epoch:
    """Metrics of one pass over the training images, measured during training: augmented images, changing weights."""

    epoch: int  # 0-based
    loss: float
    top1: float
    lr: float  # at its last step


@dataclass(frozen=True)
class FitResult:
    """History of a training; the weights are in the model."""

    history: tuple[Epoch, ...]
    resumed_at: int = 0  # epochs that were loaded from a checkpoint


@dataclass
class TrainState:
    """State that changes while a model trains, saved as tensors and JSON; nothing is pickled."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: Mapping[str, Any]  # of the training; a checkpoint made with other settings does not load
    history: list[Epoch] = field(default_factory=list)
    step: int = 0  # of the epoch that has begun: how many are done
    meter: AccuracyMeter = field(default_factory=AccuracyMeter)  # of these steps
    scaler: torch.amp.GradScaler | None = None  # of the loss, in fp16
    average: WeightAverage | None = None

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as tensors by name, and as facts that JSON stores exactly."""
        tensors = prefixed("model", self.model.state_dict())
        tensors |= prefixed("optimizer", optimizer_tensors(self.optimizer))
        facts: dict[str, Any] = {
            "settings": dict(self.settings),
            "history": [asdict(epoch) for epoch in self.history],
            "step": self.step,
            "meter": asdict(self.meter),
        }
        if self.scaler:
            facts["scaler"] = self.scaler.state_dict()
        if self.average:
            tensors |= prefixed("average", self.average.tensors)
            facts["average_steps"] = self.average.steps
        return tensors, facts

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            RunError: the state was saved by a training with other settings.
        """
        require_same_settings(facts["settings"], self.settings)
        self.model.load_state_dict(named(tensors, "model"))
        load_optimizer_tensors_(self.optimizer, named(tensors, "optimizer"))
        if self.scaler:
            self.scaler.load_state_dict(facts["scaler"])
        if self.average:
            self.average.load_(named(tensors, "average"), facts["average_steps"])
        self.history = [Epoch(**epoch) for epoch in facts["history"]]
        self.step, self.meter = facts.get("step", 0), AccuracyMeter(**facts.get("meter", {}))  # earlier versions: none

    def end_epoch_(self, lr: float) -> None:
        """Note the epoch that was trained as finished, with the learning rate of its last step."""
        self.history.append(Epoch(self.epoch, self.meter.loss, self.meter.top1, lr))
        self.step, self.meter = 0, AccuracyMeter()

    @property
    def trained(self) -> list[Tensor]:
        """Tensors that are finite unless the training diverged."""
        return list(self.model.parameters())
