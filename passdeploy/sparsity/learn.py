"""Learn which channels matter: prompt and hypernetwork together, every weight frozen.

Source: Huang et al., PASS (arXiv:2407.17412): minimise L(f(x + V; M * W), y) over the prompt V and the hypernetwork.
In every step the scores become a plan under the budget (one threshold for all groups), the plan becomes masks, and the
gradient passes straight through the masks to the scores. The network is any network, the loss any differentiable loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from passdeploy.chance import global_chance
from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup
from passdeploy.errors import TrainingError
from passdeploy.events import Stage, silent
from passdeploy.plan import Budget, choose_channels, floor_width
from passdeploy.sparsity.baselines import Loss, taylor_scores
from passdeploy.sparsity.hypernet import Hypernetwork
from passdeploy.sparsity.mask import MaskedWeights, run_with, straight_through
from passdeploy.sparsity.prompt import VisualPrompt
from passdeploy.sparsity.statistics import batch_statistics_only, weight_statistics


@dataclass(frozen=True)
class PassSettings:
    """How masks are learned; the defaults are those of a recipe."""

    steps: int = 300
    lr: float = 0.01
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    momentum: float = 0.9
    anneal: float = 0.5  # share of the steps over which the budget shrinks from all to what was asked
    prior_batches: int = 8  # batches that the first scores (Taylor) are estimated on
    prompt_kind: str = "padding"
    prompt_size: int = 8
    hypernet_kind: str = "lstm"
    hidden: int = 64
    round_to: int = 8
    per_cost: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Learned:
    """What mask learning found."""

    scores: dict[str, Tensor]  # group name -> (width,) in (0, 1)
    prompt: VisualPrompt | None
    hypernetwork: Hypernetwork
    losses: tuple[float, ...]  # one per step


def learn_masks(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    loss: Loss,
    *,
    costs: CostModel,
    budget: Budget,
    settings: PassSettings | None = None,
    stage: Stage | None = None,
) -> Learned:
    """Learn the scores of every channel of the prunable `groups` of `model`.

    Args:
        model: the trained network, on the device to learn on; it is left as it was.
        groups: the network's groups.
        batches: each call starts the same stream of (inputs, targets), on the model's device and at least
            `settings.steps` long.
        loss: of the network's output and a target.
        costs: what widths cost.
        budget: what the masked network may cost at the end.
        settings: how to learn.
        stage: told about every step.

    Returns:
        Scores averaged over the last quarter of the steps, which are calmer than those of the last one.

    Raises:
        TrainingError: the loss is not a number.
        BudgetError: the budget cannot be reached.
    """
    settings, stage = settings or PassSettings(), stage or Stage("learn", silent)
    cut = [group for group in groups if group.is_prunable]
    learner = batch_statistics_only(model)
    weights = MaskedWeights(model, cut)
    device = next(model.parameters()).device
    inputs, _ = next(iter(batches()))
    taylor = taylor_scores(model, cut, islice(batches(), settings.prior_batches), loss)
    prompt = None
    if settings.prompt_kind != "none":
        channels, height, width = inputs.shape[1:]
        prompt = VisualPrompt(settings.prompt_kind, (channels, height, width), settings.prompt_size).to(device)
    with global_chance("hypernetwork", settings.seed, device=torch.device("cpu")):
        hypernetwork = Hypernetwork(
            [values.cpu() for values in weight_statistics(model, cut)],
            _prior_logits([taylor[group.name] for group in cut]),
            hidden=settings.hidden,
            kind=settings.hypernet_kind,
            prompt_channels=inputs.size(1) if prompt else None,
        ).to(device)
    learned = [*hypernetwork.parameters(), *(prompt.parameters() if prompt else ())]
    optimizer = _optimizer(learned, settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    least = {group.name: floor_width(group, settings.round_to) for group in cut}
    floor = costs.of(budget.kind, least)
    whole = costs.of(budget.kind)
    total = {group.name: torch.zeros(group.width, device=device) for group in cut}
    losses: list[float] = []
    averaged = max(1, settings.steps // 4)
    for step, (images, targets) in enumerate(islice(batches(), settings.steps)):
        logits = hypernetwork(prompt.pixels() if prompt else None)
        scores = {group.name: values.sigmoid() for group, values in zip(cut, logits, strict=True)}
        limit = _annealed(budget.limit, whole, step, settings)
        plan = choose_channels(
            scores, cut, costs, Budget(budget.kind, max(limit, min(floor, budget.limit))),
            round_to=settings.round_to, per_cost=settings.per_cost,
        )  # fmt: skip
        masks = {}
        for name, score in scores.items():
            hard = torch.zeros_like(score)
            hard[list(plan.kept[name])] = 1.0
            masks[name] = straight_through(hard, score)
        value = loss(run_with(learner, weights(masks), prompt(images) if prompt else images), targets)
        losses.append(float(value.detach()))
        if losses[-1] != losses[-1]:
            raise TrainingError(
                f"the loss is not a number at step {step + 1} of mask learning, "
                f"with a learning rate of {schedule.get_last_lr()[0]:.3g}.\n"
                "Lower prune.optimizer.lr, or check the data."
            )
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        schedule.step()
        if step >= settings.steps - averaged:
            for name, score in scores.items():
                total[name] += score.detach() / averaged
        stage.step(step + 1, settings.steps, loss=losses[-1], budget=limit / whole)
    return Learned({name: values.cpu() for name, values in total.items()}, prompt, hypernetwork, tuple(losses))


def _annealed(limit: int, whole: int, step: int, settings: PassSettings) -> int:
    """The budget at `step`: from the whole network down to `limit`, then level."""
    ramp = settings.anneal * settings.steps
    share = min(1.0, (step + 1) / ramp) if ramp else 1.0
    return round(whole + (limit - whole) * share)


def _prior_logits(scores: Sequence[Tensor]) -> list[Tensor]:
    """Logits whose sigmoid is proportional to `scores` for all but the largest, on one scale for all groups."""
    scale = torch.cat(list(scores)).quantile(0.9).clamp_min(1e-30)
    return [(values / scale).clamp(1e-4, 10.0).log() - 1.0 for values in scores]


def _optimizer(parameters: Sequence[Tensor], settings: PassSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        parameters, settings.lr, betas=(settings.momentum, 0.999), weight_decay=settings.weight_decay
    )
