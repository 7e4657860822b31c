"""Mask learning and growing regularisation go on from a step, and end with the same bits as without an interruption."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.errors import RunError
from passdeploy.grouping.find import map_channels
from passdeploy.recipe import OptimizerSpec
from passdeploy.runtime.events import Stage, silent
from passdeploy.runtime.interrupts import TerminatedError, ending_on_sigterm
from passdeploy.sparsity import objective, shrinking
from passdeploy.sparsity.batch_loss import BatchLoss
from passdeploy.sparsity.batches import SeekableBatches, repeated, started
from passdeploy.sparsity.growing import grow_penalty
from passdeploy.sparsity.learn import Learned, PassSettings, learn_masks
from passdeploy.training import saving
from tests import nets
from tests.sparsity.test_blocks import Stack
from tests.sparsity.test_growing import Normed
from tests.sparsity.test_learn import IMAGE, stripes

Saved = tuple[dict[str, Tensor], dict[str, Any]]
BATCHES = [stripes(16, seed) for seed in range(5)]


class Memory:
    """A checkpoint that keeps every state that was saved, as files would have it."""

    def __init__(self, start: Saved | None = None) -> None:
        self.start, self.states = start, list[Saved]()

    def load(self) -> Saved | None:
        return self.start

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        copies = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        self.states.append((copies, json.loads(json.dumps(facts, allow_nan=False))))


@pytest.fixture(autouse=True)
def saved_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "EVERY_S", 0.0)
    monkeypatch.setattr(saving, "_LARGEST_SHARE", float("inf"))
    monkeypatch.setattr(shrinking, "SLACK", 0.4)  # steps between a removal and its cut
    monkeypatch.setattr(objective, "_PLANS", 4)  # steps without a plan, which would hide what was not restored


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nets.randomise_(kind()).eval()


def learn(
    net: nn.Module,
    channels: ChannelMap,
    checkpoint: Memory | None,
    loss: Any,
    stage: Stage | None = None,
    budget: float = 0.3,
    **settings: Any,
) -> Learned:
    torch.manual_seed(int(checkpoint is None))  # must not matter
    return learn_masks(
        net,
        channels.groups,
        BATCHES,
        loss,
        costs=channels.costs,
        budget={"macs": budget},
        settings=PassSettings(
            **{"steps": 12, "round_to": 1, "prompt_size": 1, "hidden": 8, "lr": 0.01, "anneal": 0.9, **settings}
        ),
        stage=stage,
        checkpoint=checkpoint,
    )


def tensors_of(learned: Learned) -> dict[str, Tensor]:
    modules = {"prompt": learned.prompt, "hypernetwork": learned.hypernetwork, "weights": learned.weights}
    states = {
        f"{kind}.{name}": t for kind, module in modules.items() if module for name, t in module.state_dict().items()
    }
    return {**learned.scores, **states}


def require_same(learned: Learned, expected: Learned) -> None:
    assert learned.plan == expected.plan
    assert learned.losses == expected.losses
    ours, theirs = tensors_of(learned), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def moments(states: list[Saved]) -> dict[str, int]:
    """Find steps in which a resumed network is hard to tell from the interrupted one, by what is special about them."""
    found, present = dict[str, int](), -1
    for number, (tensors, facts) in enumerate(states):
        now = int(tensors["network.present"].sum())
        is_masked = not torch.equal(tensors["network.unmasked"], tensors["network.present"])
        if 0 <= now < present:
            found.setdefault("cut", number)
        if is_masked:
            found.setdefault("between removal and cut", number)
            found["last removal"] = number  # after a cut
        if any(0 < gate < 1 for gate in facts["network"]["gates"].values()):
            found["block fades"] = number  # the last one, after a cut
        present = now
    return found


WITH_CHANCE = BatchLoss(lambda net, batch: F.cross_entropy(F.dropout(net(batch[0]), 0.2), batch[1]))
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "co-trained": (nets.Concatenated, F.cross_entropy, {"distill": 0.5}),
    "adamw": (
        nets.Tied,
        F.cross_entropy,
        {"weights_optimizer": OptimizerSpec(name="adamw", lr=0.01), "prompt_kind": "none", "hypernet_kind": "mlp"},
    ),
    "frozen": (nets.Grouped, F.cross_entropy, {"weights": "frozen", "optimizer": "sgd"}),
    "frozen blocks": (Stack, F.cross_entropy, {"weights": "frozen", "fade_steps": 3}),
    "rehearsed blocks": (Stack, F.cross_entropy, {"weights": "rehearsed", "fade_steps": 4, "budget": 0.2}),
    "blocks": (Stack, F.cross_entropy, {"fade_steps": 4, "hypernet_kind": "none", "memory": 0.5}),
    "norms": (Normed, F.cross_entropy, {"steps": 20}),
    "channels last": (lambda: nets.Depthwise().to(memory_format=torch.channels_last), F.cross_entropy, {}),
    "loss that draws": (nets.PaddedShortcut, WITH_CHANCE, {"prompt_kind": "none"}),
}


@pytest.mark.parametrize("case", CASES)
def test_learning_goes_on_with_the_same_bits(case: str):
    kind, loss, settings = CASES[case]
    net, memory = made(kind), Memory()
    channels = map_channels(net, IMAGE, with_blocks="blocks" in case)
    expected = learn(net, channels, None, loss, **settings)
    require_same(learn(net, channels, memory, loss, **settings), expected)  # saving changes nothing
    assert [facts["step"] for _, facts in memory.states] == list(range(1, len(expected.losses) + 1))
    found = moments(memory.states)
    assert {"cut", "between removal and cut"} <= found.keys()
    assert ("block fades" in found) == ("blocks" in case)
    for number in sorted({*found.values(), len(memory.states) - 1}):
        again = Memory(memory.states[number])
        require_same(learn(net, channels, again, loss, **settings), expected)
        assert len(again.states) == len(memory.states) - 1 - number


def test_sigterm_waits_for_the_end_of_a_step_and_its_state(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(saving, "EVERY_S", 1e9)
    net, memory = made(nets.Plain), Memory()
    channels = map_channels(net, IMAGE)

    class Terminated(Stage):
        def step(self, done: int, total: int, **metrics: float) -> None:
            if done == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    with ending_on_sigterm(), pytest.raises(TerminatedError):
        learn(net, channels, memory, F.cross_entropy, stage=Terminated("learn", silent))
    assert [facts["step"] for _, facts in memory.states] == [3]
    expected = learn(net, channels, None, F.cross_entropy)
    require_same(learn(net, channels, Memory(memory.states[0]), F.cross_entropy), expected)


def test_a_state_of_other_settings_is_refused():
    net, memory = made(nets.Plain), Memory()
    channels = map_channels(net, IMAGE)
    learn(net, channels, memory, F.cross_entropy, steps=2)
    with pytest.raises(RunError, match="other settings: lr, steps changed since"):
        learn(net, channels, Memory(memory.states[0]), F.cross_entropy, steps=3, lr=0.1)


def test_growing_goes_on_with_the_same_bits():
    net = made(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.3), nets.Head(8)))
    groups, plan = map_channels(net, IMAGE).groups, Plan({"0": (0, 2, 5)})

    def grow(memory: Memory | None) -> dict[str, Tensor]:
        torch.manual_seed(int(memory is None))
        grown = grow_penalty(
            net, groups, plan, BATCHES, F.cross_entropy, steps=5, optimizer=OptimizerSpec(lr=0.05), checkpoint=memory
        )
        return dict(grown.state_dict())

    memory = Memory()
    expected = grow(memory)
    for again in (None, Memory(memory.states[1]), Memory(memory.states[-1])):
        found = grow(again)
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_batches_that_can_be_started_anywhere_are_not_walked():
    made: list[int] = []

    def start(first: int) -> Iterator[int]:
        for number in count(first):
            made.append(number)
            yield number

    assert next(repeated(SeekableBatches(start), 7)) == next(started(SeekableBatches(start), 7)) == 7
    assert made == [7, 7]
    assert next(repeated([10, 11, 12], 7)) == 11
    assert next(started([10, 11, 12], 1)) == 11
