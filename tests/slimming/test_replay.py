"""What one network decides, another one takes over, so that only what is computed is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import nms

from passdeploy import Plan, find_groups, slim, verify
from passdeploy.errors import EquivalenceError
from passdeploy.slimming.replay import DecisionLog, decides
from tests import nets

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_ties_are_settled_as_the_first_network_settled_them():
    scores = torch.tensor([0.5, 0.9, 0.9, 0.1])
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [5, 5, 9, 9], [0, 0, 1, 1]])
    nudged = scores + torch.tensor([0, -1e-6, 0, 0])

    def decide(scores: Tensor) -> tuple[Tensor, ...]:
        values, places = scores.topk(2)
        return values, places, scores.sort(descending=True)[1], nms(boxes, scores, 0.5), (scores > 0.899999).nonzero()

    decisions = DecisionLog()
    with decisions.recording():
        first = decide(scores)
    with decisions.replaying():
        second = decide(nudged)
    assert first[1].tolist() == second[1].tolist() == [1, 2]
    assert second[0].tolist() == nudged[[1, 2]].tolist()  # its own values, at the places of the other
    assert all(torch.equal(a, b) for a, b in zip(first[2:], second[2:], strict=True))
    assert not torch.equal(decide(nudged)[1], first[1])  # alone it decides otherwise


def test_another_course_of_things_is_its_own():
    decisions = DecisionLog()
    with decisions.recording():
        torch.tensor([1.0, 2.0]).topk(1)
    with decisions.replaying():
        assert torch.tensor([3.0, 1.0, 2.0]).topk(2)[1].tolist() == [0, 2]
        assert torch.tensor([5.0, 2.0]).topk(1)[1].tolist() == [0]


def test_after_another_operation_no_decision_is_taken_over():
    decisions = DecisionLog()
    with decisions.recording():
        torch.tensor([1.0, 2.0]).topk(1)
        torch.tensor([1.0, 2.0]).argmax()
    with decisions.replaying():
        assert torch.tensor([3.0, 1.0]).argmax().item() == 0
        assert torch.tensor([3.0, 1.0]).argmax().item() == 0  # and not the recorded one
    with decisions.recording():
        pass
    with decisions.replaying():
        assert torch.tensor([3.0, 1.0]).argmax().item() == 0  # what was recorded before is gone


def test_decisions_along_any_dimension_are_taken_over():
    decisions, first = DecisionLog(), torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    with decisions.recording():
        first.sort(0)
        first.sort()
        torch.tensor(2.0).sort()
        _ = first > 2.5
    with decisions.replaying():
        assert (-first).sort(0)[0].tolist() == [[-1.0, -2.0], [-3.0, -4.0]]
        assert (-first).sort()[0].tolist() == [[-1.0, -4.0], [-2.0, -3.0]]
        assert torch.tensor(5.0).sort()[0].item() == 5.0
        assert (first > 9).tolist() == [[False, True], [True, False]]


def test_only_networks_that_rank_decide():
    assert decides(["aten.convolution", "aten.topk"])
    assert not decides(["aten.convolution", "aten.gt"])


class Picker(nn.Module):
    """Scores that saturate, so that most are equal but for rounding, and what is found at the best of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.score, self.what = nets.conv_bn(3, 8), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        scores = (self.score(x).flatten(1) * 3).sigmoid().mul(1e-9).add(1)
        best = scores.topk(5).indices
        return scores, self.what(x).flatten(2).gather(2, best[:, None].expand(-1, 4, -1))


def test_a_network_that_picks_among_equals_is_cut_and_verified():
    net = Picker().eval()
    groups = find_groups(net, IMAGES)
    assert groups[0].is_prunable
    assert verify(net, groups, Plan({groups[0].name: (0, 2, 3, 6)}), IMAGES, tolerance=1e-5) <= 1e-5


def test_a_decision_that_is_no_tie_counts_as_an_error():
    decisions = DecisionLog()
    with decisions.recording():
        torch.tensor([1.0, 4.0, 2.0]).argmax()
        _ = torch.tensor([float("-inf"), 1.0]) > 0.5
    with decisions.replaying():
        assert torch.tensor([1.0, 1.5, 2.0]).argmax().item() == 1
        assert (torch.tensor([float("-inf"), 0.5]) > 0.5).tolist() == [False, True]
    assert decisions.error == pytest.approx(2.5 / 4)
    with decisions.replaying():
        torch.tensor([0.0, 5.0, 2.0]).argmax()  # decided alike: what it was made from does not count
    assert decisions.error == 0.0


def test_a_decision_over_other_channels_is_made_anew():
    decisions = DecisionLog()
    with decisions.recording():
        torch.tensor([[1.0, 4.0], [3.0, 2.0]]).argmax(1)
        torch.tensor([1.0, 4.0]).argmax()
    with decisions.replaying():
        assert torch.tensor([[5.0, 4.0]]).argmax(1).tolist() == [0]
        assert torch.tensor([5.0, 4.0]).argmax().item() == 1
        assert decisions.error == 1.0


class Labels(nn.Module):
    """A network that shifts its features over the channels, which no mask can follow, and returns decisions alone."""

    def __init__(self, decide: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 5, 1)
        self.decide = decide

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.stem(x).relu(), 5, 1)
        return self.decide(self.head(self.body(x).relu()))


DECIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "argmax": lambda y: y.argmax(1),
    "topk": lambda y: y.topk(2, dim=1).indices,
    "sort": lambda y: y.sort(dim=1).indices,
    "argsort": lambda y: y.argsort(dim=1),
    "comparison": lambda y: y > 0,
    "nonzero": lambda y: (y > 0).nonzero(),
}


@pytest.mark.parametrize("decide", DECIDE.values(), ids=DECIDE)
def test_networks_that_return_decisions_alone_are_compared(decide: Callable[[Tensor], Tensor]):
    torch.manual_seed(0)
    net = Labels(decide).eval()
    groups = {group.name: group for group in find_groups(net, IMAGES)}
    assert not groups["stem"].is_prunable
    wrong = [replace(group, reason="") if name == "stem" else group for name, group in groups.items()]
    with pytest.raises(EquivalenceError):
        verify(net, wrong, Plan({"stem": tuple(range(8))}), IMAGES, tolerance=1e-5)
    right = Plan({"body": tuple(range(0, 16, 2))})
    assert verify(net, list(groups.values()), right, IMAGES, tolerance=1e-5) <= 1e-5


class Pose(nn.Module):
    """Keypoints, looked up in a table by the place where the map of each is largest."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 17, 1)
        self.register_buffer("columns", torch.arange(256.0) % 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.columns[self.head(self.stem(x).relu()).flatten(2).argmax(2)]


class Places(nn.Module):
    """Features that are the place where each channel is largest."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.classify = nn.Conv2d(3, 16, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.stem(x).flatten(2).argmax(2).float())


def test_what_is_looked_up_by_an_index_stays():
    groups = {group.name: group for group in find_groups(Pose().eval(), IMAGES)}
    assert (groups["stem"].is_prunable, groups["head"].is_prunable) == (True, False)
    assert "used as an index" in groups["head"].reason


def test_channels_of_which_each_has_its_own_place_can_be_cut():
    net = Places().eval()
    groups = find_groups(net, IMAGES)
    plan = Plan({"stem": (0, 3, 5, 6)})
    assert [group.is_prunable for group in groups if group.name == "stem"] == [True]
    assert verify(net, groups, plan, IMAGES, tolerance=1e-5) <= 1e-5
    assert slim(net, groups, plan)(IMAGES).shape == (2, 5)
