"""Tests of the outputs that count: what does not is neither protected nor compared, by all functions alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import passdeploy as pd
from passdeploy.errors import EquivalenceError, ModelError, UsageError
from passdeploy.sparsity.settings import PassSettings

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Detector(nn.Module):
    """A network that returns its logits and its feature maps; in training mode a dictionary with another head."""

    def __init__(self, *, has_head_of_training: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.neck = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 4, 1)
        self.other = nn.Conv2d(16, 6, 1) if has_head_of_training else None

    def forward(self, images: Tensor) -> Any:
        stem = self.stem(images).relu()
        neck = self.neck(stem).relu() + stem
        logits = self.head(neck).mean((2, 3))
        if self.training and self.other is not None:
            return {"one": logits, "many": self.other(neck), "maps": [stem, neck]}
        return logits, {"maps": [stem, neck]}


def half_plan(groups: tuple[pd.ChannelGroup, ...]) -> pd.Plan:
    return pd.Plan({group.name: tuple(range(0, group.width, 2)) for group in groups if group.is_prunable})


def prunable(groups: tuple[pd.ChannelGroup, ...]) -> set[str]:
    return {group.name for group in groups if group.is_prunable}


@pytest.mark.parametrize("outputs", [0, [0], lambda outputs: outputs[0]])
def test_outputs_that_do_not_count_protect_nothing(outputs: Any):
    net = Detector().eval()
    assert prunable(pd.find_groups(net, IMAGES)) == set()
    groups = pd.find_groups(net, IMAGES, outputs=outputs)
    assert prunable(groups) == {"stem"}  # and the neck, which is added to it
    plan = half_plan(groups)
    assert pd.verify(net, groups, plan, IMAGES, tolerance=1e-5, outputs=outputs) < 1e-5
    assert pd.slim(net, groups, plan).neck.out_channels == 8


def test_the_chosen_outputs_are_protected_whatever_their_place():
    groups = pd.find_groups(Detector().eval(), IMAGES, outputs="1.maps.0")
    assert prunable(groups) == {"head"}  # what becomes of the logits does not matter


def test_verify_without_the_choice_says_that_it_is_missing():
    net = Detector().eval()
    groups = pd.find_groups(net, IMAGES, outputs=0)
    with pytest.raises(EquivalenceError, match=r"found with outputs=\.\.\., give verify the same"):
        pd.verify(net, groups, half_plan(groups), IMAGES, tolerance=1e-5)


def test_heads_that_run_in_training_only_keep_their_outputs():
    net = Detector(has_head_of_training=True).eval()
    groups = {group.name: group for group in pd.find_groups(net, IMAGES, outputs=0)}
    assert groups["stem"].is_prunable
    assert {slot.tensor for slot in groups["stem"].slots} >= {"other.weight", "head.weight", "neck.weight"}
    assert not groups["other"].is_prunable
    assert groups["other"].reason == "the model's output"
    slim = pd.slim(net, (*groups.values(),), half_plan((*groups.values(),))).train()
    assert slim(IMAGES)["many"].shape == (2, 6, 8, 8)


class SharesItsSum(nn.Module):
    """A residual network that also returns what is inside of its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        stem = self.stem(images)
        branch = self.branch(stem)
        return {"logits": self.head((stem + branch).mean((2, 3))), "branch": branch}


def test_blocks_may_go_whose_inside_does_not_count():
    net = SharesItsSum().eval()
    assert not [block for block in pd.find_blocks(net, IMAGES) if block.is_prunable]
    (block,) = pd.find_blocks(net, IMAGES, outputs="logits")
    assert block.is_prunable
    groups = pd.find_groups(net, IMAGES, outputs="logits")
    plan = pd.Plan(half_plan(groups).kept, skipped=(block.name,))
    assert pd.verify(net, groups, plan, IMAGES, tolerance=1e-5, blocks=[block], outputs="logits") < 1e-5


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ("logits", "asks for 'logits', but the network returns a tuple of 2"),
        (5, "asks for 5, but the network returns a tuple of 2, with indices 0 to 1"),
        ([0, "1.boxes"], "asks for '1.boxes', but the network returns a dict with 'maps'"),
    ],
)
def test_a_choice_that_is_not_there_is_an_error(outputs: Any, words: str):
    net = Detector().eval()
    with pytest.raises(UsageError, match=words):
        pd.find_groups(net, IMAGES, outputs=outputs)
    with pytest.raises(UsageError, match=words):
        pd.verify(net, pd.find_groups(net, IMAGES), pd.Plan({}), IMAGES, tolerance=1e-5, outputs=outputs)


def test_a_choice_without_tensors_is_an_error():
    with pytest.raises(ModelError, match="returns NoneType, in which no tensor"):
        pd.find_groups(Detector().eval(), IMAGES, outputs=lambda outputs: None)


def test_masks_are_learned_for_the_groups_of_the_chosen_outputs():
    net = Detector().eval()
    groups = pd.find_groups(net, IMAGES, outputs=0)
    learned = pd.learn_masks(
        net,
        groups,
        [(IMAGES, torch.tensor([0, 1]))],
        lambda output, labels: F.cross_entropy(output[0], labels),
        budget={"macs": 0.5},
        settings=PassSettings(steps=2, prompt_kind="none"),
        outputs=0,
    )
    slim = pd.slim(net, groups, learned.plan)
    assert pd.count(slim, IMAGES[:1]).macs <= 0.5 * pd.count(net, IMAGES[:1]).macs
