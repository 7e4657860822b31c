"""Cost of a step of mask learning and of growing regularisation on a GPU: copies to the host, and operations launched.

No GPU is needed: operations are counted where torch dispatches them, on the CPU.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from passdeploy.channels.plan import Plan
from passdeploy.errors import TrainingError
from passdeploy.grouping.find import map_channels
from passdeploy.models.cifar_resnet import resnet20_cifar
from passdeploy.recipe import OptimizerSpec
from passdeploy.runtime.events import Stage, silent
from passdeploy.sparsity import growing, learn
from passdeploy.sparsity.objective import MaskObjective
from passdeploy.sparsity.settings import PassSettings
from passdeploy.sparsity.shrinking import ShrinkingNetwork
from passdeploy.training.losses import DistillationLoss
from passdeploy.training.optimizers import make_optimizer

BATCH = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)
SPEC = OptimizerSpec(lr=0.001)

# Each makes the host wait for a GPU. (AdamW also reads counts that it keeps on the CPU; SGD has none.)
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "sort")
# These only describe memory that is there, or reserve it: nothing is launched.
FREE = (
    *("detach", "view", "_unsafe_view", "t", "transpose", "permute", "expand", "alias", "slice", "select", "unsqueeze"),
    *("squeeze", "split", "split_with_sizes", "unsafe_split", "as_strided", "unbind", "lift_fresh", "set_"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_reshape_alias"),
)


class Operations(TorchDispatchMode):
    """Count of the operations that are dispatched while the mode is on, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done in this context."""
        before = self.counts.copy()
        yield
        self.counts = before

    def launched(self) -> int:
        return sum(count for name, count in self.counts.items() if name not in FREE)

    def read(self) -> int:
        return sum(self.counts[name] for name in READS)


class Steps(Stage):
    """A stage that notes what was done between its reports; work for a plan, which is done on the host, is left out."""

    def __init__(self, operations: Operations) -> None:
        super().__init__("learn", silent)
        self.operations, self.launched, self.read, self.done = operations, list[int](), list[int](), list[int]()

    def step(self, done: int, total: int, **metrics: float) -> None:
        self.done.append(done)
        self.launched.append(self.operations.launched())
        self.read.append(self.operations.read())
        self.operations.counts.clear()


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return resnet20_cifar()


def launched_in_a_plain_step() -> int:
    """Count the operations of the second step of plain training with a teacher; the first one fills the optimiser."""
    student = network().train()
    teacher, optimizer = DistillationLoss(copy.deepcopy(student).eval()), make_optimizer(student, SPEC)
    for _ in range(2):
        with Operations() as operations:
            optimizer.zero_grad()
            output = student(BATCH[0])
            teacher.loss_of_output(F.cross_entropy(output, BATCH[1]), output, *BATCH).backward()
            optimizer.step()
    return operations.launched()


def watched_mask_learning(monkeypatch: pytest.MonkeyPatch, *, steps: int, **settings: object) -> tuple[Steps, int]:
    """Learn masks; return what was done between the reports, and how many plans were made."""
    student, plans = network().eval(), []
    channels = map_channels(student, BATCH[0][:1])
    plan, shrink_ = MaskObjective.plan, ShrinkingNetwork.shrink_
    with Operations() as operations:

        def make_plan(self: MaskObjective, scores: Tensor, limit: int) -> Plan:
            plans.append(limit)
            operations.counts["_local_scalar_dense"] += 1  # the copy of the scores to the host
            with operations.paused():
                return plan(self, scores, limit)

        def shrink(self: ShrinkingNetwork, chosen: Plan) -> bool:
            with operations.paused():
                return shrink_(self, chosen)

        monkeypatch.setattr(MaskObjective, "plan", make_plan)
        monkeypatch.setattr(ShrinkingNetwork, "shrink_", shrink)
        watched = Steps(operations)
        chosen = {"prior_batches": 1, "distill": 0.5, "prompt_size": 4, "optimizer": "sgd", "weights_optimizer": SPEC}
        learn.learn_masks(
            student,
            channels.groups,
            partial(repeat, BATCH),
            F.cross_entropy,
            costs=channels.costs,
            budget={"macs": 0.5},
            settings=PassSettings(steps=steps, round_to=1, **{**chosen, **settings}),
            stage=watched,
        )
    return watched, len(plans)


def test_a_mask_step_launches_little_more_than_a_plain_step(monkeypatch: pytest.MonkeyPatch):
    # The LSTM is one operation on a GPU, but not here.
    watched, _ = watched_mask_learning(monkeypatch, steps=6, hypernet_kind="mlp")
    assert max(watched.launched[1:]) <= 1.3 * launched_in_a_plain_step()


def test_masks_are_learned_with_less_than_one_copy_to_the_host_in_a_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(learn, "steps_per_report", lambda device: 10)  # as on a GPU
    steps = 120
    watched, plans = watched_mask_learning(monkeypatch, steps=steps)
    assert watched.done == list(range(1, steps + 1))
    assert plans <= 32
    assert 0 < sum(watched.read[1:]) <= plans + 2 * steps / 10 < 0.5 * steps  # the first one has all that was before


@pytest.mark.parametrize("diverges_at", [0, 13, 25])
def test_a_loss_that_is_not_a_number_is_found_later_and_named_by_its_step(
    monkeypatch: pytest.MonkeyPatch, diverges_at: int
):
    reported = []
    bad = torch.full_like(BATCH[0], float("nan")), BATCH[1]
    batches = [bad if step == diverges_at else BATCH for step in range(26)]

    class Reports(Stage):
        def step(self, done: int, total: int, **metrics: float) -> None:
            reported.append((done, metrics["loss"]))

    monkeypatch.setattr(learn, "steps_per_report", lambda device: 10)
    monkeypatch.setattr(growing, "steps_per_report", lambda device: 10)
    student = network().eval()
    channels, stage = map_channels(student, BATCH[0][:1]), Reports("learn", silent)
    settings = PassSettings(steps=26, prior_batches=0, hypernet_kind="none", prompt_kind="none", optimizer="sgd")
    with pytest.raises(TrainingError, match=f"the loss is nan at step {diverges_at + 1} of mask learning"):
        learn.learn_masks(
            student,
            channels.groups,
            batches,
            F.cross_entropy,
            costs=channels.costs,
            settings=settings,
            stage=stage,
        )
    with pytest.raises(TrainingError, match=f"the loss is nan at step {diverges_at + 1} of growing"):
        growing.grow_penalty(
            student,
            channels.groups,
            Plan({}),
            batches,
            F.cross_entropy,
            steps=26,
            optimizer=OptimizerSpec(lr=0.01),
            stage=stage,
        )
    assert [done for done, _ in reported] == 2 * list(range(1, diverges_at + 1))
    assert all(math.isfinite(loss) for _, loss in reported)


def test_growing_reads_nothing_between_its_reports(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(growing, "steps_per_report", lambda device: 10)
    student = network().eval()
    groups = map_channels(student, BATCH[0][:1]).prunable
    halves = Plan({group.name: tuple(range(0, group.width, 2)) for group in groups})
    with Operations() as operations:
        watched = Steps(operations)
        growing.grow_penalty(
            student,
            groups,
            halves,
            repeat(BATCH),
            F.cross_entropy,
            steps=20,
            optimizer=OptimizerSpec(lr=0.01),
            stage=watched,
        )
    assert watched.done == list(range(1, 21))
    assert sum(watched.read[1:]) == watched.read[0] - watched.read[10] == 0
