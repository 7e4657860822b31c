"""`verify` finds a slim network that is not what its plan says, whatever hides it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import passdeploy as pd
from benchmarks.zoo import randomise_
from passdeploy.errors import EquivalenceError, ModelError, PlanError
from passdeploy.grouping.trial_cut import random_plan
from passdeploy.models.outputs import comparable_in, tensors_in
from passdeploy.slimming.agreement import relative_error
from passdeploy.slimming.verify import check_equivalence, removed_slices_zeroed_
from tests.nets import family

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Headed(nn.Module):
    """A classifier whose logits leave `forward` in a form of their own."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.answer = nn.Conv2d(3, 16, 3, 2), nn.Linear(16, 10), answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.head(self.stem(x).relu().mean((2, 3))))


@dataclass
class Result:
    name: str
    logits: Tensor


class Pair(NamedTuple):
    logits: Tensor
    image: int


class Boxes:
    def __init__(self, logits: Tensor) -> None:
        self.data = {"scores": [logits]}


class Slotted:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


ANSWERS: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda y: y,
    "a dictionary": lambda y: {"logits": y, "note": "text"},
    "a named tuple": lambda y: Pair(y, 3),
    "a dataclass": lambda y: Result("net", y),
    "an object": Boxes,
    "an object with slots": Slotted,
    "a list of dataclasses": lambda y: [Result("net", row) for row in y],
    "an object in a dataclass": lambda y: Result("net", Boxes(y)),  # type: ignore[arg-type]
    "an array": lambda y: y.detach().numpy(),
    "an array, through numpy.asarray": lambda y: np.asarray(y.detach()),
    "a tensor made of an array": lambda y: torch.from_numpy(y.detach().numpy() * 2),
    "lists": lambda y: y.tolist(),
    "numbers": lambda y: [float(value) for value in y[0].detach()],
    "items": lambda y: {"best": y[0, 3].item()},
    "a tensor made of lists": lambda y: torch.tensor(y.tolist()),
    "the best class": lambda y: int(y[0].argmax()),
    "the best class as a tensor": lambda y: y.argmax(1),
    "the best five": lambda y: y.topk(5).indices.tolist(),
}
WITHOUT_COMPARISON: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda y: None,
    "a text": lambda y: f"class {int(y[0].argmax())}",
    "a function": lambda y: lambda: y,
    "an empty list": lambda y: [],
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_classes_stay_however_the_answer_is_given(answer: Callable[[Tensor], Any]):
    net = Headed(answer).eval()
    groups = {group.name: group for group in pd.find_groups(net, IMAGES)}
    assert (groups["stem"].is_prunable, groups["head"].is_prunable) == (True, False)
    plan = pd.Plan({"stem": tuple(range(0, 16, 2))})
    assert pd.verify(net, tuple(groups.values()), plan, IMAGES, tolerance=1e-5) <= 1e-5
    assert len(comparable_in(pd.slim(net, tuple(groups.values()), plan)(IMAGES))) >= 1


def test_what_leaves_torch_is_named_with_its_line():
    groups = {group.name: group for group in pd.find_groups(Headed(ANSWERS["lists"]).eval(), IMAGES)}
    assert "its values leave torch" in groups["head"].reason
    assert "test_verify.py:" in groups["head"].reason


@pytest.mark.parametrize("answer", WITHOUT_COMPARISON.values(), ids=WITHOUT_COMPARISON)
def test_an_answer_without_anything_to_compare_is_refused(answer: Callable[[Tensor], Any]):
    net = Headed(answer).eval()
    with pytest.raises(ModelError, match="no tensor, array or number"):
        pd.find_groups(net, IMAGES)
    groups = pd.find_groups(Headed(ANSWERS["a tensor"]).eval(), IMAGES)
    with pytest.raises(EquivalenceError, match="nothing that can be compared"):
        pd.verify(net, groups, pd.Plan({"stem": (0, 1)}), IMAGES, tolerance=1e-5)


def test_numbers_in_a_row_are_compared_together():
    numbers, tensor, classes = comparable_in([1.5, 1e-9, torch.ones(3), [True, 2]])
    assert numbers.tolist() == [1.5, 1e-9]
    assert tensor.tolist() == [1.0, 1.0, 1.0]
    assert classes.tolist() == [1, 2]
    assert relative_error(numbers, numbers + 1e-9) < 1e-8


def test_tensors_are_found_in_objects_that_hold_each_other():
    first, second = Boxes(torch.ones(2)), Boxes(torch.zeros(3))
    first.data["other"], second.data["other"] = second, first  # type: ignore[assignment]
    assert [len(tensor) for tensor in tensors_in([first, None, "text"])] == [2, 3]


# Faults that the comparison of slim and masked alone does not see


def dense_copy(model: nn.Module, *_: Any) -> nn.Module:
    return copy.deepcopy(model)


def plan_for(net: nn.Module) -> tuple[tuple[pd.ChannelGroup, ...], pd.Plan]:
    groups = pd.find_groups(net, IMAGES)
    return groups, pd.Plan({"stem": tuple(range(0, 16, 2))})


def test_a_plan_without_effect_is_an_error(monkeypatch: pytest.MonkeyPatch):
    net = Headed(ANSWERS["a tensor"]).eval()
    groups, plan = plan_for(net)
    monkeypatch.setattr("passdeploy.slimming.verify.slim", dense_copy)
    monkeypatch.setattr("passdeploy.slimming.verify.masked", dense_copy)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(EquivalenceError, match="the plan had no effect"):
        pd.verify(net, groups, plan, IMAGES, tolerance=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_channels_that_do_not_matter_may_go_without_effect():
    net = Headed(ANSWERS["a tensor"]).eval()
    with torch.no_grad():
        net.head.weight[:, 1::2] = 0.0
    groups, plan = plan_for(net)
    assert pd.verify(net, groups, plan, IMAGES, tolerance=1e-5) <= 1e-5


def test_a_copy_that_reads_the_original_is_an_error(monkeypatch: pytest.MonkeyPatch):
    net = Headed(ANSWERS["a tensor"]).eval()
    groups, plan = plan_for(net)

    class Calling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = net(x)
            return result

    monkeypatch.setattr("passdeploy.slimming.verify.slim", lambda *_: Calling())
    monkeypatch.setattr("passdeploy.slimming.verify.masked", lambda *_: Calling())
    with pytest.raises(EquivalenceError, match=r"computes with stem\.weight of the original"):
        pd.verify(net, groups, plan, IMAGES, tolerance=1e-5)


def test_a_slim_network_that_is_not_called_through_its_class_is_an_error(monkeypatch: pytest.MonkeyPatch):
    from passdeploy.slimming.slim import slim

    net = Headed(ANSWERS["a tensor"]).eval()
    groups, plan = plan_for(net)
    dense = copy.deepcopy(net)

    def patched(model: nn.Module, *rest: Any) -> nn.Module:
        smaller = slim(model, *rest)
        smaller.forward = dense.forward  # type: ignore[method-assign]
        return smaller

    monkeypatch.setattr("passdeploy.slimming.verify.slim", patched)
    monkeypatch.setattr("passdeploy.slimming.verify.masked", dense_copy)
    monkeypatch.setattr("passdeploy.slimming.verify._require_effect", lambda *_: None)
    with pytest.raises(EquivalenceError, match="something else than its class does"):
        pd.verify(net, groups, plan, IMAGES, tolerance=1e-5)


def spoiled(change: Callable[[nn.Module], object]) -> Callable[..., nn.Module]:
    """Return `slim` with a fault in what it returns that no output shows."""
    from passdeploy.slimming.slim import slim

    def faulty(*given: Any) -> nn.Module:
        smaller = slim(*given)
        change(smaller)
        return smaller

    return faulty


SPOILED: dict[str, tuple[Callable[[Any], object], str]] = {
    "a frozen weight": (
        lambda net: net.stem.requires_grad_(False),
        "no longer a parameter with the same requires_grad",
    ),
    "training mode": (lambda net: net.head.train(), "head is in another mode"),
    "a stated size": (lambda net: setattr(net.stem, "out_channels", 16), "stem states other sizes than its weight has"),
    "a hook": (lambda net: net.head.register_forward_hook(lambda *_: None), "head has other hooks than before"),
    "a compiled call": (lambda net: net.head.compile(backend="eager"), "still calls what nn.Module.compile made"),
    "a buffer": (lambda net: net.register_buffer("extra", torch.ones(1)), "extra exists, or is shared, in one"),
    "a dtype": (lambda net: net.__dict__["_buffers"].update(unread=net.unread.double()), "unread has another dtype"),
    "values": (lambda net: net.unread.add_(1), "unread has other values than what the plan keeps"),
    "memory order": (lambda net: setattr(net, "table", nn.Parameter(net.table.contiguous())), "channels-last"),
}


@pytest.mark.parametrize(("change", "words"), SPOILED.values(), ids=SPOILED)
def test_a_fault_that_no_output_shows_is_an_error(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object], words: str
):
    net = Headed(ANSWERS["a tensor"]).eval()
    net.register_buffer("unread", torch.tensor([1.0, float("nan")]))
    net.table = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    groups, plan = plan_for(net)
    assert pd.verify(net, groups, plan, IMAGES, tolerance=1e-5) <= 1e-5
    monkeypatch.setattr("passdeploy.slimming.verify.slim", spoiled(change))
    with pytest.raises(EquivalenceError, match=words):
        pd.verify(net, groups, plan, IMAGES, tolerance=1e-5)


def test_other_channels_than_those_of_the_plan_are_an_error(monkeypatch: pytest.MonkeyPatch):
    net = Headed(ANSWERS["a tensor"]).eval()
    groups, plan = plan_for(net)
    others = pd.Plan({"stem": tuple(range(1, 16, 2))})
    for name, function in (("slim", pd.slim), ("masked", pd.masked)):
        monkeypatch.setattr(
            f"passdeploy.slimming.verify.{name}",
            lambda model, groups, *_, function=function: function(model, groups, others),
        )
    with pytest.raises(EquivalenceError, match=r"has other values|something else than its class"):
        pd.verify(net, groups, plan, IMAGES, tolerance=1e-5)


def test_copies_that_all_compute_something_else_are_an_error(monkeypatch: pytest.MonkeyPatch):
    from passdeploy.models.cloning import ModelCloner

    copied, deep_copied = ModelCloner.copy, ModelCloner.deep_copy

    def doubling(copy_of: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def changed(*given: Any) -> nn.Module:
            network = copy_of(*given)
            network.answer = lambda y: 2 * y
            return network

        return changed

    net = Headed(ANSWERS["a tensor"]).eval()
    groups, plan = plan_for(net)
    monkeypatch.setattr(ModelCloner, "copy", doubling(copied))
    monkeypatch.setattr(ModelCloner, "deep_copy", doubling(deep_copied))
    with pytest.raises(EquivalenceError, match="a copy of the network without any cut answers otherwise"):
        pd.verify(net, groups, plan, IMAGES, tolerance=1e-5)


def test_groups_of_a_wrapped_network_are_an_error():
    net = Headed(ANSWERS["a tensor"]).eval()
    groups, plan = plan_for(net)
    with pytest.raises(PlanError, match="no such tensor"):
        pd.verify(nn.Sequential(net), groups, plan, IMAGES, tolerance=1e-5)


def test_a_value_that_is_not_a_number_is_an_error():
    for found in ([1.0, float("nan")], [1.0, float("inf")]):
        assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor(found)) == float("inf")
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")])) == float("inf")


def test_errors_of_several_outputs():
    assert relative_error(torch.tensor([1.0, 2.0, -4.0]), torch.tensor([1.0, 2.0, -3.0])) == 0.25
    assert relative_error(torch.tensor([0.0]), torch.tensor([1e-30])) == pytest.approx(1.0)
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")
    assert relative_error(torch.ones(0), torch.ones(0)) == 0.0
    assert relative_error(torch.tensor([3 + 4j]), torch.tensor([3 + 0j])) == pytest.approx(0.8)
    assert relative_error(torch.tensor([3.0]), torch.tensor([3 + 3j])) == pytest.approx(1.0)


def test_outputs_of_another_number_or_shape_are_an_error(monkeypatch: pytest.MonkeyPatch):
    net = Headed(lambda y: (y, y)).eval()
    groups, plan = plan_for(net)
    for answer in (lambda y: y, lambda y: (y, y[:, :5])):
        monkeypatch.setattr("passdeploy.slimming.verify.slim", spoiled(lambda net, a=answer: setattr(net, "answer", a)))
        with pytest.raises(EquivalenceError, match=r"other shapes than the masked one's.* inputs of shape 2x3x32x32"):
            pd.verify(net, groups, plan, IMAGES, tolerance=1e-5)


def test_a_slim_network_that_does_not_run_is_an_error_with_its_first_line(monkeypatch: pytest.MonkeyPatch):
    def failing(_: Tensor) -> Tensor:
        raise ValueError("no such size\nmore of it")

    net = Headed(ANSWERS["a tensor"]).eval()
    groups, plan = plan_for(net)
    monkeypatch.setattr("passdeploy.slimming.verify.slim", spoiled(lambda net: setattr(net, "answer", failing)))
    with pytest.raises(EquivalenceError, match=r"does not run on inputs of shape 2x3x32x32: .*no such size") as caught:
        pd.verify(net, groups, plan, IMAGES, tolerance=1e-5)
    assert "more of it" not in str(caught.value)


def test_equal_answers_are_within_a_tolerance_of_zero():
    net = Headed(ANSWERS["a tensor"]).eval()
    assert pd.verify(net, pd.find_groups(net, IMAGES), pd.Plan({}), IMAGES, tolerance=0.0) == 0.0


class Sparse(Headed):
    """A classifier that adds up its classes in pairs, with a sparse matrix."""

    def __init__(self) -> None:
        super().__init__(ANSWERS["a tensor"])
        self.register_buffer("pairs", torch.eye(10).repeat_interleave(2, 0)[:10].to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.pairs, super().forward(x).T).T


def test_a_network_with_a_sparse_buffer_is_cut_and_compared():
    net = Sparse().eval()
    groups, plan = plan_for(net)
    assert pd.verify(net, groups, plan, IMAGES, tolerance=1e-5) <= 1e-5
    assert pd.slim(net, groups, plan).pairs is not net.pairs


def test_the_sizes_of_a_comparison_are_told():
    net = Headed(ANSWERS["a tensor"]).eval()
    groups, plan = plan_for(net)
    text = check_equivalence(net, groups, plan, IMAGES, tolerance=1e-5).size_text
    first, second, alone = text.split(" and ")
    assert (first, alone) == ("2x3x32x32", "1x3x32x32")
    assert second != first  # another size, which the network takes as well


# The second reference


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x1_0", "regnet_y_400mf", "vgg11_bn", "googlenet"]
)
def test_cutting_equals_zeroing_the_slices_of_the_network_itself(name: str):
    plain = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    net = randomise_(family(name, **plain)).double()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    groups = pd.find_groups(net, images)
    plan = random_plan(groups, 1)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with torch.no_grad():
        smaller, dense = pd.slim(net, groups, plan)(images), net(images)
        with removed_slices_zeroed_(net, groups, plan):
            zeroed = net(images)
    assert relative_error(zeroed, smaller) < 1e-9
    assert relative_error(dense, smaller) > 1e-3
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


class Detector(nn.Module):
    """Boxes in pixels and scores near zero in one output; what scores are computed from is shifted over channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.box, self.stem, self.score = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 16, 3), nn.Conv2d(16, 5, 3)
        nn.init.constant_(self.score.bias, -11.0)

    def forward(self, x: Tensor) -> Tensor:
        found = self.score(torch.roll(self.stem(x).relu(), 5, 1))
        boxes, scores = 640 * self.box(x).sigmoid().mean((2, 3)), found.sigmoid().mean((2, 3))
        return torch.cat([boxes, scores], 1)


def test_a_small_part_of_an_output_that_is_wrong_is_an_error():
    net = Detector().eval()
    groups = tuple(
        replace(group, reason="") if group.name == "stem" else group for group in pd.find_groups(net, IMAGES)
    )
    plan = pd.Plan({"stem": (1, 6, 9)})
    with torch.no_grad():
        assert relative_error(pd.masked(net, groups, plan)(IMAGES), pd.slim(net, groups, plan)(IMAGES)) < 1e-6
    with pytest.raises(EquivalenceError, match="in a part of an output that is small beside the others"):
        pd.verify(net, groups, plan, IMAGES, tolerance=1e-5)
    assert pd.verify(net, groups, pd.Plan({}), IMAGES, tolerance=1e-5) == 0.0


class Averaging(nn.Module):
    """A network that keeps an average of what it has seen, in evaluation mode too, and counts calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 5)
        self.register_buffer("average", torch.zeros(16))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        self.calls += 1
        self.average.mul_(0.5).add_(y.mean((0, 2, 3)), alpha=0.5)
        return self.head((y - self.average[:, None, None]).relu().mean((2, 3)))


def test_a_network_that_changes_its_buffers_is_compared_call_by_call_and_left_as_it_was():
    net = Averaging().eval()
    groups = pd.find_groups(net, IMAGES)
    assert pd.verify(net, groups, pd.Plan({"stem": (1, 6, 9)}), IMAGES, tolerance=1e-5) <= 1e-5
    assert int(net.calls) == 0
    assert not net.average.any()
