"""Settings of mask learning, and how they follow from a recipe's `prune` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from passdeploy.errors import UsageError, clipped

if TYPE_CHECKING:
    from passdeploy.recipe import OptimizerSpec, PruneSpec, Recipe

_WORDS = {
    "optimizer": ("adamw", "sgd"),
    "weights": ("frozen", "rehearsed", "trained"),
    "prompt_kind": ("padding", "full", "none"),
    "hypernet_kind": ("lstm", "mlp", "conv", "none"),
    "allocation": ("global", "uniform"),
}
_SHARES = ("anneal", "memory", "distill", "momentum")
_COUNTS = {"steps": 0, "prior_batches": 0, "prompt_size": 1, "hidden": 1, "fade_steps": 1, "round_to": 1}  # at least


@dataclass(frozen=True)
class PassSettings:
    """Settings of `learn_masks`; the defaults are those of a recipe, except that nothing is distilled.

    Raises:
        UsageError: one of them has no meaning.
    """

    steps: int = 300
    lr: float = 0.001
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    momentum: float = 0.9
    anneal: float = 0.5  # share of the steps over which the budget shrinks from the dense cost to the target
    prior_batches: int = 8  # batches that the first Taylor importance is estimated on
    memory: float = 0.95  # weight of the past in the running Taylor importance; 1: the first values stay
    weights: str = "trained"  # frozen; rehearsed: a copy is co-trained and thrown away; trained: the copy is kept
    weights_optimizer: OptimizerSpec | None = None  # of that copy; None: SGD at a rate of 0.01
    prompt_kind: str = "padding"
    prompt_size: int = 8
    distill: float = 0.0  # weight of distillation from the dense network in the loss; only for classification
    temperature: float = 4.0  # divides the logits of both networks before they are compared
    only_better: bool = False  # distil only where the dense network's loss is lower; needs class indices as targets
    hypernet_kind: str = "lstm"
    hidden: int = 64
    fade_steps: int = 10  # over which the gate of a removed block falls to zero
    round_to: int = 8
    per_cost: bool = True
    allocation: str = "global"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, words in _WORDS.items():
            if (word := getattr(self, name)) not in words:
                raise UsageError(f"{name}={clipped(repr(word))} is unknown.\nIt is one of {', '.join(words)}.")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}={clipped(getattr(self, name))} is no share.\nIt is a number from 0 to 1.")
        for name, least in _COUNTS.items():
            if getattr(self, name) < least:
                raise UsageError(f"{name}={clipped(getattr(self, name))} is too few.\nIt is at least {least}.")

    @classmethod
    def from_recipe(cls, recipe: Recipe, *, round_to: int) -> PassSettings:
        """Build the settings that a recipe asks for.

        Args:
            recipe: of the run.
            round_to: widths become multiples of this (`prune.round_to` may say auto).
        """
        prune = recipe.prune
        return cls(
            steps=prune.steps,
            lr=prune.optimizer.lr,
            weight_decay=prune.optimizer.weight_decay,
            optimizer=prune.optimizer.name,
            momentum=prune.optimizer.momentum,
            anneal=prune.anneal,
            weights=prune.weights,
            weights_optimizer=weights_optimizer_of(recipe),
            prompt_kind=prune.prompt.kind,
            prompt_size=prune.prompt.size,
            distill=prune.distill.alpha if prune.distill else 0.0,
            temperature=prune.distill.temperature if prune.distill else 1.0,
            only_better=bool(prune.distill and prune.distill.only_better),
            hypernet_kind=prune.hypernet.kind,
            hidden=prune.hypernet.hidden,
            round_to=round_to,
            per_cost=prune.per_cost,
            allocation=allocation_of(prune),
            seed=recipe.seed,
        )


def weights_optimizer_of(recipe: Recipe) -> OptimizerSpec:
    """Return the optimiser of weights that are trained while channels are chosen: fine-tuning's, at `weights_lr`."""
    lr, optimizer = recipe.prune.weights_lr, recipe.finetune.optimizer
    return optimizer if lr is None else optimizer.model_copy(update={"lr": lr})


def allocation_of(prune: PruneSpec) -> str:
    """Resolve `prune.allocation`: auto is uniform for method uniform, else global."""
    if prune.allocation == "auto":
        return "uniform" if prune.method == "uniform" else "global"
    return prune.allocation
