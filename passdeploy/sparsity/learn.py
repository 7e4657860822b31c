"""Mask learning (PASS): train the prompt and the hypernetwork that score channels, and co-train the weights.

Source: Huang et al., PASS (arXiv:2407.17412): minimise L(f(x + V; M * W), y) over the prompt V and the hypernetwork.
The scores become a plan under the budget (one threshold for all groups), the plan becomes masks, and in every step the
gradient passes straight through the masks to the scores. The network is any network, the loss any differentiable loss.
A step makes no plan and reads nothing back to the host, so that a GPU stays busy: plans are made in some steps only
(`objective.py`), and losses are looked at some steps later.

Three things are added to the paper, and `benchmarks/results/accuracy-trials.md` says what each is worth. The
hypernetwork corrects a prior, the Taylor importance, which is measured again in every step (`importance.py`). The
budget shrinks gradually, and removed channels are cut out of the network for good (`shrinking.py`). The weights are
co-trained with the masks (`weight_trainer.py`) unless they are to be frozen, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from passdeploy.channels.allocation import Budget
from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.errors import TrainingError, UsageError, clipped
from passdeploy.grouping.find import map_channels
from passdeploy.models.chosen_outputs import OutputChoice
from passdeploy.models.prompt import VisualPrompt
from passdeploy.runtime.distributed import SINGLE_PROCESS, Processes
from passdeploy.runtime.events import Stage, silent
from passdeploy.runtime.seeds import seeded_global_generators
from passdeploy.sparsity.baselines import taylor_scores
from passdeploy.sparsity.batch_loss import BatchLoss
from passdeploy.sparsity.batches import Loss, Stream, first_batch, inputs_in, repeated
from passdeploy.sparsity.hypernet import Hypernetwork, weight_statistics
from passdeploy.sparsity.importance import TaylorImportance
from passdeploy.sparsity.learning_state import LearningState
from passdeploy.sparsity.objective import MaskObjective
from passdeploy.sparsity.scorer import load_hypernetwork_, make_scorer
from passdeploy.sparsity.settings import PassSettings as PassSettings
from passdeploy.sparsity.shrinking import ShrinkingNetwork
from passdeploy.training.deferred import DeferredScalars, StepReport, steps_per_report
from passdeploy.training.saving import Checkpoint, Saving, saving
from passdeploy.training.step import divergence, gradient_step_


@dataclass(frozen=True)
class Learned:
    """Result of mask learning, at its end or where its budget passed a larger one."""

    scores: dict[str, Tensor]  # group name -> (width,) in (0, 1); `presence` of a block -> (1,)
    prompt: VisualPrompt | None
    hypernetwork: Hypernetwork
    losses: tuple[float, ...]  # one per step that was made
    plan: Plan  # the channels that the scores keep under the budget
    weights: nn.Module | None = None  # the co-trained copy, if the settings keep it; removed channels as in the model


def learn_masks(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Stream,
    loss: Loss,
    *,
    costs: CostModel | None = None,
    budget: Budget | Mapping[str, float] | None = None,
    larger_budgets: Sequence[Budget] = (),
    on_larger_budget: Callable[[Budget, Learned], None] | None = None,
    settings: PassSettings | None = None,
    start: Mapping[str, Tensor] | None = None,
    teacher: nn.Module | None = None,
    stage: Stage | None = None,
    processes: Processes = SINGLE_PROCESS,
    outputs: OutputChoice | None = None,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Learned:
    """Learn the scores of every channel of the prunable `groups` of `model`, and of the blocks that `costs` knows.

    Args:
        model: the trained network, on the device to learn on; it is left as it was.
        groups: the network's groups.
        batches: (inputs, targets) on the model's device, iterated again and again: something that can be iterated
            more than once, or a function that starts the same stream. With a `BatchLoss`, batches of any form.
        loss: of the network's output and a target, a mean over the batch; or a `BatchLoss`, which runs the network.
        costs: of the groups' widths; None: traces the network once more, with one of the inputs.
        budget: cost limit of the masked network at the end, as a `Budget` or as `{"macs": 0.5}`; None: half the MACs.
        larger_budgets: of the same kind, which the shrinking budget passes on its way.
        on_larger_budget: called when it is about to pass one of them, with that budget and what is learned so far: its
            plan meets it. Prompt and hypernetwork are trained further afterwards; copy what is to stay.
        settings: steps, optimiser, prompt, hypernetwork and so on; None: the defaults, without a prompt if the loss is
            a `BatchLoss`.
        start: `state_dict` of a trained hypernetwork to start from.
        teacher: of distillation, where `settings.distill` asks for it; None: the network itself.
        stage: hears of every step.
        processes: that learn together, each with its part of every batch.
        outputs: which of the network's outputs count, as for `find_groups`; only needed where `costs` is None.
        example_inputs: to trace the network with where `costs` is None; None: one of the inputs of the first batch.
        checkpoint: loaded once at the start, and saved after a minute of work and before SIGINT or SIGTERM ends the
            program. Learning goes on from the step that it has and ends with the same bits, if `batches` are the same
            ones every time; those of earlier steps are walked again (not those of `SeekableBatches`).

    Returns:
        The scores of the last step, the plan that they make, and the trained prompt, hypernetwork and weights.

    Raises:
        TrainingError: the loss, a weight or a score is not a number.
        BudgetError: the budget cannot be reached.
        DataError: there are no batches.
        RunError: `start` comes from a hypernetwork of another network; the checkpoint was made with other settings.
        UsageError: a `BatchLoss` is asked for what needs images and targets: a prompt, distillation, costs; a prompt
            for inputs that are no images; a `budget` of several kinds or of an unknown one; no group is prunable.
    """
    settings, stage = settings or _default_settings(loss), stage or Stage("learn", silent)
    prunable = [group for group in groups if group.is_prunable]
    if not prunable:
        raise UsageError("no channel group can be pruned, so there is nothing to learn.\nEach says why in its reason.")
    first = first_batch(batches)
    images = None if isinstance(loss, BatchLoss) else inputs_in(first, loss)
    if costs is None:
        if example_inputs is None:
            example_inputs = inputs_in(first, loss)[:1]
        costs = map_channels(model, example_inputs, outputs=outputs).costs
    if isinstance(loss, BatchLoss):
        _require_no_images_needed(settings)
    if not isinstance(budget, Budget):
        budget = _read_budget({"macs": 0.5} if budget is None else budget, costs)
    objective = MaskObjective(model, prunable, loss, costs, budget, settings, teacher or model)
    channels = objective.network.channels
    saved = checkpoint.load() if checkpoint else None
    if saved is None:
        first_batches = islice(repeated(batches), settings.prior_batches)
        with seeded_global_generators("prior", settings.seed, processes.rank, device=next(model.parameters()).device):
            scores = taylor_scores(model, prunable, first_batches, loss, blocks=channels.blocks, processes=processes)
        prior = channels.join(scores)
    else:
        prior = saved[0]["importance"]
    importance = TaylorImportance(prior.to(next(model.parameters()).device), settings.memory)
    statistics = weight_statistics(model, prunable, channels.blocks)
    prompted = None if settings.prompt_kind == "none" else images
    prompt, hypernetwork = make_scorer(statistics, importance, prompted, settings)
    state = LearningState(objective, importance, prompt, hypernetwork)
    if saved is not None:
        state.load_state_dict(*saved)
    elif start is not None:
        load_hypernetwork_(hypernetwork, start)
        importance.load_logits_(hypernetwork.prior)
    on_way = _BudgetsOnTheWay(tuple(larger_budgets), on_larger_budget)
    with saving(checkpoint, processes) as saves:
        _train_(state, repeated(batches, state.step), stage, processes, saves, on_way)
    return _learned(state, budget, state.scores())


def _learned(state: LearningState, budget: Budget, scores: Tensor) -> Learned:
    """Plan for a budget by the scores of now, and return it with everything that is learned."""
    network, learned = state.objective.network, _on_host(scores, state)
    kept = network.restored() if state.settings.weights == "trained" else None
    plan = state.objective.plan(learned, budget.limit)
    by_group = {name: values.clone() for name, values in network.channels.split(learned).items()}
    return Learned(by_group, state.prompt, state.hypernetwork, tuple(state.losses), plan, kept)


def _on_host(scores: Tensor, state: LearningState) -> Tensor:
    """Copy scores to the host; raise a TrainingError if one is not finite, as after a gradient that is not."""
    copied = scores.detach().cpu()
    problem = None if np.isfinite(copied.numpy()).all() else "a score is not a number"
    _require_convergence(problem, max(0, state.step - 1), float(state.schedule.get_last_lr()[0]))
    return copied


@dataclass(frozen=True)
class _BudgetsOnTheWay:
    """Budgets that the shrinking one passes, and who hears of it."""

    budgets: tuple[Budget, ...]
    listener: Callable[[Budget, Learned], None] | None

    def report(self, state: LearningState, new_limit: int, scores: Tensor) -> None:
        """Report the budgets between that of the newest plan and a smaller limit, the largest first."""
        if self.listener is None:
            return
        for budget in sorted(self.budgets, key=lambda budget: -budget.limit):
            if new_limit < budget.limit <= state.limit:
                self.listener(budget, _learned(state, budget, scores))


def _train_(
    state: LearningState,
    batches: Iterator[Any],
    stage: Stage,
    processes: Processes,
    saves: Saving,
    on_way: _BudgetsOnTheWay,
) -> None:
    """Make all steps that are left, from which everything in `state` follows."""
    objective, importance, settings = state.objective, state.importance, state.settings
    co_trained, network, device = objective.co_trained, objective.network, importance.scores.device
    reports = _Reports(stage, settings.steps, objective.dense_cost, device, state.losses)
    limits = objective.plan_limits()[state.step :]
    for step, (new_limit, batch) in enumerate(zip(limits, batches, strict=False), start=state.step):
        scores = state.scores()
        if new_limit is not None:
            reports.flush()  # a diverged network makes no plan
            on_way.report(state, new_limit, scores)
            state.limit = new_limit
            network.shrink_(objective.plan(_on_host(scores, state), new_limit))
            importance.set_kept_(network.kept)
        # The gradients of prompt and weights are those of a part of the batch; those of the hypernetwork follow from
        # their averages.
        optimizers: dict[torch.optim.Optimizer, Sequence[Tensor]] = {state.optimizer: state.of_prompt}
        if co_trained:  # shrinking may have replaced its parameters
            co_trained.set_lr_(step)
            optimizers[co_trained.optimizer] = co_trained.parameters
        for each in optimizers:
            each.zero_grad()
        # A loss of the user's may draw at random, as those of detectors do.
        with seeded_global_generators("learn", settings.seed, step, processes.rank, device=device):
            with processes.synchronised_batch_norm():
                loss = objective.loss(state.prompt, batch)
            loss, mean_loss = processes.over_batch(loss, objective.samples_in(batch))
            reports.add(step, mean_loss, state.limit, float(state.schedule.get_last_lr()[0]))
            pass_on = partial(_take_channel_gradients_, network, scores, importance, state.hypernetwork, processes)
            gradient_step_(loss, optimizers, processes, change_gradients_=pass_on)
        state.schedule.step()
        state.step += 1
        if saves.is_wanted(reports.deferred):
            reports.flush()
            saves.save(state)
    reports.flush()
    if co_trained and reports.losses:  # after all other steps, the loss of the next one would show it
        problem = divergence(reports.losses[-1], co_trained.parameters)
        _require_convergence(problem, settings.steps - 1, reports.lr)


def _take_channel_gradients_(
    network: ShrinkingNetwork,
    scores: Tensor,
    importance: TaylorImportance,
    hypernetwork: Hypernetwork,
    processes: Processes,
) -> None:
    """Pass the gradients by masks straight through to the scores, and take those by gates into the prior."""
    by_masks, by_gates = processes.average(network.channel_gradients())
    torch.autograd.backward(scores, by_masks.to(scores.dtype))
    with torch.no_grad():
        importance.update_(by_gates)
        hypernetwork.set_prior_(importance.logits())


class _Reports:
    """Losses of the steps, looked at and reported together some steps later."""

    def __init__(self, stage: Stage, steps: int, dense_cost: int, device: torch.device, losses: list[float]) -> None:
        self._stage, self._steps, self._dense_cost = stage, steps, dense_cost
        self.deferred = DeferredScalars(every=steps_per_report(device))
        self.losses = losses  # of the steps that were looked at
        self.lr = 0.0  # of the last step that was looked at

    def add(self, step: int, loss: Tensor, limit: int, lr: float) -> None:
        """Take the loss of a step, on its device; raises a TrainingError if a loss before it was not finite."""
        self._report(self.deferred.add(step, loss=loss, budget=limit / self._dense_cost, lr=lr))

    def flush(self) -> None:
        """Look at all losses that were taken, and report them."""
        self._report(self.deferred.flush())

    def _report(self, reports: Sequence[StepReport]) -> None:
        for report in reports:
            loss, self.lr = report.values["loss"], report.values["lr"]
            _require_convergence(divergence(loss), report.step, self.lr)
            self.losses.append(loss)
            self._stage.step(report.step + 1, self._steps, loss=loss, budget=report.values["budget"])


def _require_convergence(problem: str | None, step: int, lr: float) -> None:
    """Raise a TrainingError if there is a problem after `step`."""
    if problem:
        raise TrainingError(
            f"{problem} at step {step + 1} of mask learning, with a learning rate of {lr:.3g}.\n"
            "The dense network is as it was. Lower prune.optimizer.lr, or the rate of the weights (prune.weights_lr, "
            "without it finetune.optimizer.lr), or check the data."
        )


def _read_budget(budget: Mapping[str, float], costs: CostModel) -> Budget:
    """Read a budget such as `{"macs": 0.5}`."""
    kinds = ["macs", "params", "channels", *([] if costs.latency is None else ["latency"])]
    if len(budget) != 1 or not budget.keys() <= set(kinds):
        raise UsageError(
            f"budget={clipped(dict(budget))}: it needs exactly one of {', '.join(kinds)}.\n"
            "Give one, such as budget={'macs': 0.5}."
        )
    ((kind, amount),) = budget.items()
    return Budget.of(kind, amount, costs)


def _default_settings(loss: Loss) -> PassSettings:
    return PassSettings(prompt_kind="none") if isinstance(loss, BatchLoss) else PassSettings()


def _require_no_images_needed(settings: PassSettings) -> None:
    """Raise UsageError where the settings ask for what changes images or looks at outputs."""
    asked = [] if settings.prompt_kind == "none" else [f"prompt (prompt_kind={settings.prompt_kind!r})"]
    if asked := [*asked, *(["distillation"] if settings.distill else [])]:
        raise UsageError(
            f"a BatchLoss runs the network itself, so there is no {' and no '.join(asked)}.\n"
            "Leave that out of the settings (prompt_kind='none'), or give a loss of outputs and targets."
        )
