"""State of mask learning that checkpoints save, so that it goes on from a step with the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from passdeploy.models.prompt import VisualPrompt
from passdeploy.sparsity.hypernet import Hypernetwork
from passdeploy.sparsity.importance import TaylorImportance
from passdeploy.sparsity.objective import MaskObjective
from passdeploy.sparsity.settings import PassSettings
from passdeploy.training.optimizers import load_optimizer_tensors_, optimizer_tensors
from passdeploy.training.saving import named, prefixed, require_same_settings

_OF_SCHEDULE = ("last_epoch", "_step_count", "_last_lr")


class LearningState:
    """Everything that changes while masks are learned: scorer, optimisers, shrinking network, budget and losses.

    Saved as tensors and JSON; nothing is pickled. It has no random state, since every step draws from a generator of
    its own, and the batches that come next follow from the number of steps.

    Args:
        objective: with the network that shrinks and its co-trained weights.
        importance: the prior of the hypernetwork.
        prompt: None: none is learned.
        hypernetwork: that scores the channels.
    """

    def __init__(
        self,
        objective: MaskObjective,
        importance: TaylorImportance,
        prompt: VisualPrompt | None,
        hypernetwork: Hypernetwork,
    ) -> None:
        self.objective, self.importance, self.prompt, self.hypernetwork = objective, importance, prompt, hypernetwork
        self.settings = objective.settings
        self.of_prompt = list(prompt.parameters()) if prompt else []
        self.optimizer = _make_scorer_optimizer([*hypernetwork.parameters(), *self.of_prompt], self.settings)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(1, self.settings.steps))
        self.step = 0  # how many are done
        self.limit = objective.dense_cost  # of the budget of the newest plan
        self.losses: list[float] = []  # one per step

    def scores(self) -> Tensor:
        """Compute the scores of all channels of all groups, each in (0, 1)."""
        logits: Tensor = self.hypernetwork(self.prompt.pixels() if self.prompt else None)
        return logits.sigmoid()

    @property
    def trained(self) -> list[Tensor]:
        """Tensors that are finite unless the learning diverged."""
        co_trained = self.objective.co_trained
        return [*self.hypernetwork.parameters(), *self.of_prompt, *(co_trained.parameters if co_trained else ())]

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state after `step` steps as tensors by name, and as facts that JSON stores exactly."""
        tensors, facts = self.objective.network.state_dict()
        tensors = prefixed("network", tensors) | prefixed("hypernetwork", self.hypernetwork.state_dict())
        tensors |= prefixed("prompt", self.prompt.state_dict() if self.prompt else {})
        tensors |= prefixed("optimizer", optimizer_tensors(self.optimizer))
        tensors["importance"] = self.importance.scores
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        schedule = self.schedule.state_dict()
        return tensors, {
            "settings": self._fixed(),
            "step": self.step,
            "limit": self.limit,
            "network": facts,
            "schedule": {key: schedule[key] for key in _OF_SCHEDULE},
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned into a state that has made no step.

        Raises:
            RunError: it was saved with other settings.
        """
        require_same_settings(facts["settings"], self._fixed())
        self.objective.network.load_state_dict(named(tensors, "network"), facts["network"])
        self.hypernetwork.load_state_dict(named(tensors, "hypernetwork"))
        if self.prompt:
            self.prompt.load_state_dict(named(tensors, "prompt"))
        load_optimizer_tensors_(self.optimizer, named(tensors, "optimizer"))
        self.schedule.load_state_dict(facts["schedule"])
        for group, lr in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = lr
        self.importance.scores = tensors["importance"].to(self.importance.scores.device)
        self.importance.set_kept_(self.objective.network.kept)
        self.step, self.limit, self.losses = facts["step"], facts["limit"], tensors["losses"].tolist()

    def _fixed(self) -> dict[str, Any]:
        """Return what must be the same when learning goes on, as JSON has it."""
        weights_optimizer = self.settings.weights_optimizer
        return {
            **asdict(self.settings),
            "weights_optimizer": weights_optimizer and weights_optimizer.model_dump(mode="json"),
            "budget": [self.objective.budget.kind, self.objective.budget.limit],
            "widths": dict(self.objective.network.channels.widths),
        }


def _make_scorer_optimizer(parameters: list[Tensor], settings: PassSettings) -> torch.optim.Optimizer:
    """Make the optimiser of prompt and hypernetwork."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        parameters, settings.lr, betas=(settings.momentum, 0.999), weight_decay=settings.weight_decay
    )
