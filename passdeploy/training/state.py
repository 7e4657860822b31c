"""The state of a training that can be saved and resumed: weights, optimiser, averages and position."""

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
    """One pass over the training images, measured on the way: augmented images, changing weights."""

    epoch: int  # 0-based
    loss: float
    top1: float
    lr: float  # at its last step


@dataclass(frozen=True)
class FitResult:
    """What training went through; the weights are in the model."""

    history: tuple[Epoch, ...]
    resumed_at: int = 0  # epochs taken over from a checkpoint


class Checkpoint(Protocol):
    """Where a long stage leaves what it needs to go on; `RunFolder.checkpoint` makes one."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest tensors and facts that were saved whole, or None."""

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep these, which JSON and safetensors can hold, in place of earlier ones."""


@dataclass
class TrainState:
    """All that changes while a model trains, as plain tensors and JSON: nothing is pickled."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: Mapping[str, Any]  # what the training was asked to do; a checkpoint of another does not load
    history: list[Epoch] = field(default_factory=list)
    scaler: torch.amp.GradScaler | None = None  # of the loss, in fp16
    average: WeightAverage | None = None

    @property
    def epoch(self) -> int:
        """Epochs that are finished."""
        return len(self.history)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and facts that JSON holds exactly."""
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
        """Go back to where `state_dict` was called.

        Raises:
            RunError: the state belongs to a training with other settings.
        """
        if facts["settings"] != dict(self.settings):
            known = facts["settings"]
            keys = {*known, *self.settings}
            changed = sorted(key for key in keys if known.get(key) != self.settings.get(key))
            raise RunError(
                f"the checkpoint was made with other settings: {', '.join(changed)} changed since.\n"
                "Resume with the recipe of the run, or start a new run without --resume."
            )
        weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        self.model.load_state_dict(weights)
        for index, parameter in enumerate(self._trained()):
            prefix = f"optimizer.{index}."
            for name in [name for name in tensors if name.startswith(prefix)]:
                buffer = _laid_out_like(parameter, tensors[name])
                self.optimizer.state[parameter][name.removeprefix(prefix)] = buffer
        if self.scaler:
            self.scaler.load_state_dict(facts["scaler"])
        if self.average:
            averages = {name.removeprefix("average."): t for name, t in tensors.items() if name.startswith("average.")}
            self.average.load_(averages, facts["average_steps"])
        self.history = [Epoch(**epoch) for epoch in facts["history"]]

    def _trained(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def _laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A buffer of the optimiser in the memory order it had: its steps then round as they did."""
    if tensor.shape != parameter.shape:
        return tensor.clone()  # a count of steps
    return torch.empty_like(parameter, requires_grad=False).copy_(tensor)
