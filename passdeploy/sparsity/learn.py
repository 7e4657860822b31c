"""Learn which channels matter: prompt and hypernetwork together, and a copy of the weights beside them.

Source: Huang et al., PASS (arXiv:2407.17412): minimise L(f(x + V; M * W), y) over the prompt V and the hypernetwork.
In every step the scores become a plan under the budget (one threshold for all groups), the plan becomes masks, and the
gradient passes straight through the masks to the scores. The network is any network, the loss any differentiable loss.

Three things are ours, and `benchmarks/results/accuracy-trials.md` says what each is worth. The hypernetwork corrects
a prior that is measured again in every step (`importance.py`). The budget shrinks gradually, and what is gone is cut
out for good (`shrinking.py`). And the weights learn along with the masks (`weight_trainer.py`), unless they are to be
frozen as in the paper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.channels.allocation import Budget, choose_channels
from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.channels.widths import minimum_width
from passdeploy.errors import DataError, RunError, TrainingError
from passdeploy.grouping.find import map_channels
from passdeploy.models.prompt import VisualPrompt
from passdeploy.recipe import OptimizerSpec
from passdeploy.runtime.distributed import SINGLE_PROCESS, Processes
from passdeploy.runtime.events import Stage, silent
from passdeploy.runtime.seeds import seeded_global_generators
from passdeploy.sparsity.baselines import Loss, taylor_scores
from passdeploy.sparsity.hypernet import Hypernetwork, weight_statistics
from passdeploy.sparsity.importance import TaylorImportance
from passdeploy.sparsity.shrinking import ShrinkingNetwork
from passdeploy.sparsity.weight_trainer import CoTrainedWeights
from passdeploy.training.losses import DistillationLoss, logits_of

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PassSettings:
    """How masks are learned; the defaults are those of a recipe."""

    steps: int = 300
    lr: float = 0.001
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    momentum: float = 0.9
    anneal: float = 0.9  # share of the steps over which the budget shrinks from all to what was asked
    prior_batches: int = 8  # batches that the first scores (Taylor) are estimated on
    memory: float = 0.95  # of the running scores that the hypernetwork corrects; 1: the first ones stay
    weights: str = "trained"  # frozen; rehearsed: a copy learns along and is thrown away; trained: it is kept
    weights_optimizer: OptimizerSpec | None = None  # of that copy; None: SGD at a rate of 0.01
    prompt_kind: str = "padding"
    prompt_size: int = 8
    distill: float = 0.0  # share of the loss that is the dense network's answers; for class scores only
    temperature: float = 4.0  # softens both answers before they are compared
    only_better: bool = False  # answers count where the dense network's loss is the lower one; targets are classes then
    hypernet_kind: str = "lstm"
    hidden: int = 64
    round_to: int = 8
    per_cost: bool = True
    allocation: str = "global"
    seed: int = 0


@dataclass(frozen=True)
class Learned:
    """What mask learning found."""

    scores: dict[str, Tensor]  # group name -> (width,) in (0, 1)
    prompt: VisualPrompt | None
    hypernetwork: Hypernetwork
    losses: tuple[float, ...]  # one per step
    plan: Plan  # what the scores keep under the budget
    weights: nn.Module | None = None  # the copy that learned along, where it is to be kept


def learn_masks(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Batches | Callable[[], Batches],
    loss: Loss,
    *,
    costs: CostModel | None = None,
    budget: Budget | Mapping[str, float] | None = None,
    settings: PassSettings | None = None,
    start: Mapping[str, Tensor] | None = None,
    teacher: nn.Module | None = None,
    stage: Stage | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> Learned:
    """Learn the scores of every channel of the prunable `groups` of `model`.

    Args:
        model: the trained network, on the device to learn on; it is left as it was.
        groups: the network's groups.
        batches: (inputs, targets) on the model's device, walked again and again: something that can be iterated more
            than once, or a function that starts the same stream.
        loss: of the network's output and a target, a mean over the batch.
        costs: what widths cost; None follows the network once more, with one of the inputs.
        budget: what the masked network may cost at the end, as a `Budget` or as `{"macs": 0.5}`; None: half the MACs.
        settings: how to learn.
        start: tensors of a trained hypernetwork to start from, as its `state_dict` names them.
        teacher: answers where `settings.distill` asks for it; None: the network itself.
        stage: told about every step.
        processes: that learn together, each with its part of every batch.

    Returns:
        The scores of the last step, the plan that they make, and what was learned with them.

    Raises:
        TrainingError: the loss is not a number.
        BudgetError: the budget cannot be reached.
        DataError: there are no batches.
        RunError: `start` is of a hypernetwork for another network.
    """
    settings, stage = settings or PassSettings(), stage or Stage("learn", silent)
    cut = [group for group in groups if group.is_prunable]
    inputs = next((inputs for inputs, _ in _restarted(batches)), None)
    if inputs is None:
        raise DataError("there is no batch to learn masks from.\nHand in batches that can be walked more than once.")
    costs = costs or map_channels(model, inputs[:1]).costs
    if not isinstance(budget, Budget):
        kind, amount = next(iter((budget or {"macs": 0.5}).items()))
        budget = Budget.of(kind, amount, costs)
    task = _Task(model, cut, loss, costs, budget, settings, processes, teacher or model)
    prior = taylor_scores(model, cut, islice(_cycle(batches), settings.prior_batches), loss, processes=processes)
    importance = TaylorImportance({name: scores.to(inputs.device) for name, scores in prior.items()}, settings.memory)
    prompt, hypernetwork = _students(model, cut, importance, inputs, settings)
    if start is not None:
        _take_over_(hypernetwork, start)
        importance.take_over_(hypernetwork.prior())
    losses = _descend(task, importance, prompt, hypernetwork, _cycle(batches), stage)
    scores = {name: values.detach().cpu() for name, values in _scores(cut, prompt, hypernetwork).items()}
    kept = task.network.whole() if settings.weights == "trained" else None
    return Learned(scores, prompt, hypernetwork, losses, task.plan(scores, budget.limit), kept)


class _Task:
    """The masked network and its budget: scores in, loss out."""

    def __init__(
        self,
        model: nn.Module,
        cut: Sequence[ChannelGroup],
        loss: Loss,
        costs: CostModel,
        budget: Budget,
        settings: PassSettings,
        processes: Processes,
        teacher: nn.Module,
    ) -> None:
        self.cut, self.costs, self.budget, self.settings, self.processes = cut, costs, budget, settings, processes
        self.co_trained = None
        if settings.weights != "frozen":
            self.co_trained = CoTrainedWeights(model, settings.weights_optimizer or OptimizerSpec(lr=0.01))
        self.network, self._loss = ShrinkingNetwork(model, cut, costs, self.co_trained), loss
        self._imitation = None
        if settings.distill:
            asked = copy.deepcopy(teacher, {id(p): p for p in teacher.parameters()}).eval()  # shares the parameters
            self._imitation = DistillationLoss(asked, settings.distill, settings.temperature, settings.only_better)
        self.whole = costs.of(budget.kind)
        floor = costs.of(
            budget.kind, {group.name: minimum_width(group, settings.round_to, budget.kind) for group in cut}
        )
        self._least = min(floor, budget.limit)

    def plan(self, scores: Mapping[str, Tensor], limit: int) -> Plan:
        """What `scores` keep within `limit`, of what is still there."""
        settings, scores = self.settings, self.network.demoted(scores)
        plan = choose_channels(
            scores, self.cut, self.costs, Budget(self.budget.kind, limit), round_to=settings.round_to,
            per_cost=settings.per_cost, allocation=settings.allocation,
        )  # fmt: skip
        return self.network.within(plan)

    def limit_at(self, step: int) -> int:
        """The budget at `step`: from the whole network down to what was asked, then level.

        What is left to cut falls with the cube of the time (Zhu and Gupta, arXiv:1710.01878, eq. 1): fast while much
        can go for little, slowly at the end.
        """
        ramp = self.settings.anneal * self.settings.steps
        left = (1 - min(1.0, (step + 1) / ramp)) ** 3 if ramp else 0.0
        return max(self._least, round(self.budget.limit + (self.whole - self.budget.limit) * left))

    def loss(
        self, scores: Mapping[str, Tensor], plan: Plan, prompt: VisualPrompt | None, images: Tensor, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the network that `plan` leaves, and the gates on its channels.

        The loss's gradient reaches the scores straight through the masks, and every gate.
        """
        output, gates = self.network.run(scores, plan, prompt(images) if prompt else images)
        value = self._loss(output, targets)
        if self._imitation:
            each = partial(F.cross_entropy, target=targets, reduction="none")
            value = self._imitation.loss(value, logits_of(output), images, each)
        return value, gates


def _descend(
    task: _Task, importance: TaylorImportance, prompt: VisualPrompt | None, hypernetwork: Hypernetwork,
    batches: Iterator[tuple[Tensor, Tensor]], stage: Stage,
) -> tuple[float, ...]:  # fmt: skip
    """Train prompt and hypernetwork in place, the weights beside them, and measure the prior; returns all losses."""
    settings, processes, co_trained = task.settings, task.processes, task.co_trained
    learned = [*hypernetwork.parameters(), *(prompt.parameters() if prompt else ())]
    optimizer = _optimizer(learned, settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, settings.steps))
    losses: list[float] = []
    for step, (images, targets) in enumerate(islice(batches, settings.steps)):
        limit = task.limit_at(step)
        scores = _scores(task.cut, prompt, hypernetwork)
        plan = task.plan(scores, limit)
        importance.keep_(plan)
        task.network.shrink_(plan)
        optimizer.zero_grad(set_to_none=True)
        if co_trained:
            co_trained.forget_()
        with processes.synchronised_batch_norm():
            value, gates = task.loss(scores, plan, prompt, images, targets)
            losses.append(float(processes.mean_over_batch(value.detach(), len(images))))
            if not math.isfinite(losses[-1]):
                raise _diverged(f"the loss is {losses[-1]}", step, float(schedule.get_last_lr()[0]))
            value.backward()
        processes.average_gradients_(learned)
        optimizer.step()
        schedule.step()
        if co_trained:
            processes.average_gradients_(co_trained.parameters)  # apart: the network may be of another precision
            co_trained.step_(step)
            if step + 1 == settings.steps and not co_trained.has_numbers():  # earlier the next loss would show it
                raise _diverged("a weight is not a number", step, float(schedule.get_last_lr()[0]))
        with torch.no_grad():
            gate_gradients = task.network.gate_gradients(gates)
            mean = processes.mean_over_batch(
                torch.cat([*gate_gradients.values()]), len(images)
            )  # one message for all groups
            importance.update_(dict(zip(gate_gradients, mean.split([*map(len, gate_gradients.values())]), strict=True)))
            hypernetwork.set_prior_([importance.logits()[group.name] for group in task.cut])
        stage.step(step + 1, settings.steps, loss=losses[-1], budget=limit / task.whole)
    return tuple(losses)


def _diverged(what: str, step: int, lr: float) -> TrainingError:
    return TrainingError(
        f"{what} at step {step + 1} of mask learning, with a learning rate of {lr:.3g}.\n"
        "The dense network is as it was. Lower prune.optimizer.lr, or the rate of the weights (prune.weights_lr, "
        "without it finetune.optimizer.lr), or check the data."
    )


def _scores(cut: Sequence[ChannelGroup], prompt: VisualPrompt | None, hypernetwork: Hypernetwork) -> dict[str, Tensor]:
    logits = hypernetwork(prompt.pixels() if prompt else None)
    return {group.name: values.sigmoid() for group, values in zip(cut, logits, strict=True)}


def _students(
    model: nn.Module,
    cut: Sequence[ChannelGroup],
    importance: TaylorImportance,
    inputs: Tensor,
    settings: PassSettings,
) -> tuple[VisualPrompt | None, Hypernetwork]:
    """The prompt and the hypernetwork that will learn, on the model's device."""
    device, prompt = next(model.parameters()).device, None
    if settings.prompt_kind != "none":
        channels, height, width = inputs.shape[1:]
        prompt = VisualPrompt(settings.prompt_kind, (channels, height, width), settings.prompt_size).to(device)
    with seeded_global_generators("hypernetwork", settings.seed, device=torch.device("cpu")):
        hypernetwork = Hypernetwork(
            [values.cpu() for values in weight_statistics(model, cut)],
            [importance.logits()[group.name].cpu() for group in cut],
            hidden=settings.hidden,
            kind=settings.hypernet_kind,
            prompt_channels=inputs.size(1) if prompt else None,
        )
    return prompt, hypernetwork.to(device)


def _take_over_(hypernetwork: Hypernetwork, start: Mapping[str, Tensor]) -> None:
    """Fill a hypernetwork with trained tensors; the statistics of the weights stay those of its own network."""
    trained = {name: tensor for name, tensor in start.items() if not name.startswith("statistics")}
    own = hypernetwork.state_dict()
    odd = sorted(
        name for name in {*trained, *own}
        if not name.startswith("statistics")
        and (name not in trained or name not in own or own[name].shape != trained[name].shape)
    )  # fmt: skip
    if odd:
        raise RunError(
            f"the hypernetwork to start from does not fit: {len(odd)} tensors differ (first '{odd[0]}').\n"
            "It must be of the same network, with the same prune.hypernet, prune.include and prune.exclude."
        )
    hypernetwork.load_state_dict(trained, strict=False)


def _restarted(batches: Batches | Callable[[], Batches]) -> Iterator[tuple[Tensor, Tensor]]:
    return iter(batches() if callable(batches) else batches)


def _cycle(batches: Batches | Callable[[], Batches]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches without end."""
    while True:
        had_any = False
        for batch in _restarted(batches):
            had_any = True
            yield batch
        if not had_any:
            raise DataError("the batches can be walked only once.\nHand in a list, a loader, or a function.")


def _optimizer(parameters: Sequence[Tensor], settings: PassSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        parameters, settings.lr, betas=(settings.momentum, 0.999), weight_decay=settings.weight_decay
    )
