"""A trial cuts a network once, and sets its size attributes as often as asked."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import SizeAttribute
from passdeploy.grouping.constraints import Constraints, LabelledSize
from passdeploy.grouping.find import find_groups
from passdeploy.grouping.run_trial import run_trial
from passdeploy.grouping.tied_widths import WidthEquality
from passdeploy.grouping.traced_network import TracedNetwork
from passdeploy.grouping.trial_cut import TrialCut, plan_of, random_plan
from passdeploy.tracing.labels import LabelUnionFind, Reason
from passdeploy.tracing.meta_model import MetaModel
from passdeploy.tracing.trace_channels import trace_channels


class Stated(nn.Module):
    """A network that states its width in two attributes and uses neither."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.sizes = 8, (8, 16)
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits."""
        return self.head(self.conv(x).mean((2, 3)))


class Viewing(nn.Module):
    """A network that gives a view its width, from an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits."""
        return self.head(self.conv(x).view(1, self.width, 16).mean(2))


def traced(net: nn.Module) -> TracedNetwork:
    images = torch.zeros(1, 3, 4, 4)
    meta_model = MetaModel.of(net.eval(), [images])
    return TracedNetwork.of(net, [images], meta_model, trace_channels(net, images, meta_model=meta_model))


def output_labels(network: TracedNetwork, tensor: str) -> Tensor:
    return next(state.labels for state in network.trace.state if (state.tensor, state.dim) == (tensor, 0))


def test_size_attributes_are_written_and_taken_back():
    network = traced(Stated())
    trial, labels = TrialCut(network, network.trace.union_find, 0), output_labels(network, "conv.weight")
    left = trial.size_of(labels)
    assert 2 <= left < 8

    def model_with(*sizes: LabelledSize) -> Any:
        return trial.model_with(network.builder.gather(Constraints(network.trace.union_find, sizes)))

    first = model_with(LabelledSize(SizeAttribute("", "width", None), labels))
    assert (first.width, first.sizes, first.conv.out_channels) == (left, (8, 16), left)
    second = model_with(LabelledSize(SizeAttribute("", "sizes", 0), labels))
    assert (second.width, second.sizes) == (8, (left, 16))
    third = model_with()
    assert (third.width, third.sizes) == (8, (8, 16))
    assert first is third
    trial.discard_model()
    assert model_with() is not first


def test_a_trial_stops_at_a_stale_size_and_runs_once_the_attribute_follows():
    network = traced(Viewing())
    without = Constraints(network.trace.union_find)
    size = LabelledSize(SizeAttribute("", "width", None), output_labels(network, "conv.weight"))
    cut = TrialCut(network, without.labels, 0)
    stopped, ran = run_trial(cut, without), run_trial(cut, without.with_size_attributes([size]))
    assert stopped.stop
    assert stopped.stop.record.op == "aten.view"
    assert ran.stop is None
    assert ran.gets_further_than(stopped)
    assert not stopped.gets_further_than(ran)
    again = run_trial(cut, without)  # nothing is left of the trials before
    assert again.stop == stopped.stop


def test_constraints_are_extended_as_copies():
    labels = LabelUnionFind()
    first, second = labels.new_labels(4).split(2)
    plain = Constraints(labels)
    joined = plain.with_equality(WidthEquality(("line",), ((first, second),)))
    protected = joined.with_protected(first, Reason("a test"))
    assert [len(each.labels.find(torch.cat([first, second])).unique()) for each in (plain, joined, protected)] == [
        4,
        2,
        2,
    ]
    assert [len(each.labels.protections()[1]) for each in (plain, joined, protected)] == [0, 0, 1]
    assert len({each.labels.version for each in (plain, joined, protected)}) == 3
    assert (plain.equality_keys, protected.equality_keys) == ((), (("line",),))
    kept = protected.with_equality(WidthEquality(("other",), ((first, second),)))
    assert kept.labels.version == protected.labels.version  # channels that must stay are not joined


def test_random_plans_cut_neighbours_differently():
    groups = [replace(traced(Stated()).builder.gather()[0], name=str(number), width=24) for number in range(13)]
    plans = [random_plan(groups, trial_index).kept for trial_index in range(3)]
    assert all(8 <= len(kept) <= 15 for kept in plans[0].values())
    for plan in plans[1:]:
        assert all(abs(len(plan[str(n)]) - len(plan[str(n + 1)])) > 6 for n in range(12))


def test_random_plans_keep_exact_parts_and_widths_without_small_factors():
    groups = [replace(traced(Stated()).builder.gather()[0], name=str(width), width=width) for width in (7, 24, 64)]
    halves = random_plan(groups, -2).kept
    assert (len(halves["24"]), len(halves["64"])) == (12, 32)
    for trial_index in range(4):
        widths = random_plan(groups, trial_index, with_odd_widths=True).widths()
        assert all(width % prime for width in widths.values() for prime in (2, 3, 5))
    assert plan_of(groups, (("24", 5), ("unknown", 3), ("7", 7))).widths() == {"24": 5}


def test_neighbours_of_two_channels_are_cut_to_different_widths():
    """As a stream of two channels and an attention of two heads, whose sizes must not be equal by chance alone."""
    layers = [nn.Conv2d(3, 2, 1), *(nn.Conv2d(2, 2, 1) for _ in range(5))]
    groups = find_groups(nn.Sequential(*layers), torch.zeros(1, 3, 4, 4))
    prunable = [group for group in groups if group.is_prunable]
    for trial_index in (1, 2):
        kept = random_plan(groups, trial_index).widths()
        widths = [kept.get(group.name, group.width) for group in prunable]
        assert all(one != other for one, other in pairwise(widths))
