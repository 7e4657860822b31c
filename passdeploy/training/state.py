"""Training state that checkpoints save and resume: weights, optimiser, scaler, weight average and history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from passdeploy.errors import RunError
from passdeploy.training.optimizers import WeightAverage


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


class Checkpoint(Protocol):
    """Storage for the state of a training; `RunFolder.checkpoint` makes one."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Load the newest tensors and facts that were saved completely; None if there are none."""

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Save tensors (as safetensors) and facts (as JSON) in place of earlier ones."""


@dataclass
class TrainState:
    """State that changes while a model trains, saved as tensors and JSON; nothing is pickled."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: Mapping[str, Any]  # of the training; a checkpoint made with other settings does not load
    history: list[Epoch] = field(default_factory=list)
    scaler: torch.amp.GradScaler | None = None  # of the loss, in fp16
    average: WeightAverage | None = None

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as tensors by name, and as facts that JSON stores exactly."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, parameter in enumerate(self._trained()):
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{index}.{key}"] = value
        facts: dict[str, Any] = {"settings": dict(self.settings), "history": [asdict(epoch) for epoch in self.history]}
        if self.scaler:
            facts["scaler"] = self.scaler.state_dict()
        if self.average:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
            facts["average_steps"] = self.average.steps
        return tensors, facts

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            RunError: the state was saved by a training with other settings.
        """
        if facts["settings"] != dict(self.settings):
            saved = facts["settings"]
            keys = {*saved, *self.settings}
            changed = sorted(key for key in keys if saved.get(key) != self.settings.get(key))
            raise RunError(
                f"the checkpoint was made with other settings: {', '.join(changed)} changed since.\n"
                "Resume with the recipe of the run, or start a new run without --resume."
            )
        weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        self.model.load_state_dict(weights)
        is_fused = bool(self.optimizer.defaults.get("fused"))
        for index, parameter in enumerate(self._trained()):
            prefix = f"optimizer.{index}."
            for name in [name for name in tensors if name.startswith(prefix)]:
                buffer = _placed_like_parameter(parameter, tensors[name], is_fused)
                self.optimizer.state[parameter][name.removeprefix(prefix)] = buffer
        if self.scaler:
            self.scaler.load_state_dict(facts["scaler"])
        if self.average:
            averages = {name.removeprefix("average."): t for name, t in tensors.items() if name.startswith("average.")}
            self.average.load_(averages, facts["average_steps"])
        self.history = [Epoch(**epoch) for epoch in facts["history"]]

    def _trained(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def _placed_like_parameter(parameter: Tensor, tensor: Tensor, is_fused: bool) -> Tensor:
    """Copy an optimiser buffer into the memory order of its parameter, so that later steps round in the same way."""
    if tensor.shape != parameter.shape:  # a step counter, which only fused kernels read on the device
        return tensor.to(parameter.device, copy=True) if is_fused else tensor.clone()
    return torch.empty_like(parameter, requires_grad=False).copy_(tensor)
