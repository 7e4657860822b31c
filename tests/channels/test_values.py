"""Channel groups, blocks, costs and plans are values: they do not change, and say in a line what they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import passdeploy
from passdeploy.channels.allocation import in_units
from passdeploy.channels.blocks import Block, Replacement, is_inside, outermost, replacements_of, skipped_in
from passdeploy.channels.costs import CostModel, Factor, Polynomial, Term
from passdeploy.channels.groups import ChannelGroup, SizeAttribute, Slot, cuts_whole_groups
from passdeploy.channels.plan import Plan


def values() -> Iterator[type]:
    folder = Path(passdeploy.__file__).parent
    for path in sorted((*folder.glob("channels/*.py"), *folder.glob("slimming/*.py"))):
        module = import_module(f"passdeploy.{path.parent.name}.{path.stem}")
        found = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
        yield from (value for value in found if dataclasses.is_dataclass(value))


def test_values_do_not_change():
    classes = {value.__name__: value for value in values()}
    assert {"Plan", "Budget", "ChannelGroup", "Slot", "Block", "CostModel", "WidthTable", "KeptMask"} <= classes.keys()
    assert {name for name, value in classes.items() if not value.__dataclass_params__.frozen} == set()


def test_what_holds_tensors_is_equal_to_itself_alone():
    slot = Slot("a.weight", 0, torch.arange(2)[:, None], is_output=True, is_input=False)
    assert slot == slot
    assert slot != dataclasses.replace(slot)
    group = ChannelGroup("a", 2, (slot,))
    assert group != dataclasses.replace(group)
    assert Plan({"a": (0,)}) == Plan({"a": (0,)})


def test_values_say_what_they_are():
    slot = Slot("a.b.weight", 0, torch.arange(2)[:, None], is_output=True, is_input=False)
    assert slot.layer == "a.b"
    sizes = ((SizeAttribute("a", "width", None), Factor(0, (("a.b", 1),))),)
    assert ChannelGroup("a.b", 2, (slot,), size_attributes=sizes).numbers == sizes
    assert repr(ChannelGroup("a.b", 2, (slot,))) == "ChannelGroup('a.b', width=2, prunable)"
    assert repr(ChannelGroup("a.b", 2, (slot,), "text")) == "ChannelGroup('a.b', width=2, protected: text)"
    assert repr(ChannelGroup("a.b", 1, (slot,))) == "ChannelGroup('a.b', width=1, protected: a single channel)"
    assert repr(Block("a")) == "Block('a', prunable)"
    assert repr(Block("a", reason="text")) == "Block('a', must stay: text)"
    assert (in_units("macs", 1_234_567), in_units("latency", 1_800_000)) == ("1,234,567 macs", "1.8 ms")


@pytest.mark.parametrize(
    ("groups", "inputs", "whole"),
    [(1, 1, False), (1, 8, False), (2, 1, True), (2, 2, True), (2, 3, False), (8, 1, True), (4, 8, False)],
)
def test_grouped_layers_lose_whole_groups_where_that_leaves_more_choice(groups: int, inputs: int, whole: bool):
    assert cuts_whole_groups(groups, inputs) is whole


def test_a_mask_that_keeps_nothing_keeps_the_first_channel():
    masks = {"a": torch.tensor([False, True, True]), "b": torch.tensor([False, False])}
    plan = Plan.of_masks(masks)
    assert plan == Plan({"a": (1, 2), "b": (0,)})
    assert plan.widths() == {"a": 2, "b": 1}


def test_modules_inside_of_others():
    assert is_inside("a.b", "a")
    assert is_inside("a", "a")
    assert is_inside("a", "")  # the network itself
    assert not is_inside("ab", "a")
    assert not is_inside("a", "a.b")
    assert skipped_in({"a": 0, "block:b": 0, "block:c": 1}) == ("b",)


def test_a_chain_of_blocks_is_replaced_as_one_where_all_of_them_go():
    whole = Replacement("stage", "identity")
    one = Block("stage.0", replacements=(Replacement("stage.0", "identity"),), chains=(whole,))
    two = Block("stage.1", replacements=(Replacement("stage.1", "identity"),), chains=(whole,))
    other = Block("other", replacements=(Replacement("other", "identity"),))
    blocks = (one, two, other)
    assert replacements_of(blocks, ("stage.0", "stage.1", "other")) == [whole, *other.replacements]
    assert replacements_of(blocks, ("stage.0", "other")) == [*one.replacements, *other.replacements]
    assert outermost([dataclasses.replace(other, contains=("stage.0",)), one, two])[1:] == [two]


def polynomial() -> Polynomial:
    """3 (2 + a) b + 5 a, with a = 4 and b = 6."""
    a, b, plain = Factor(0, (("a", 1),)), Factor(0, (("b", 1),)), Factor(2, (("a", 1),))
    terms = [Term(3 * 6 * 6, [plain, b], "one"), Term(4 * 4, [a], "two"), Term(4, [a, Factor(7, ())], "three")]
    return Polynomial.build({"a": 4, "b": 6}, terms)


def test_a_cost_is_a_sum_of_products_of_sizes():
    cost = polynomial()
    for a, b in ((4, 6), (1, 6), (4, 1), (0, 3), (2, 0)):
        assert cost.value(np.array([a, b])) == 3 * (2 + a) * b + 5 * a
        assert cost.gradient(np.array([a, b])).tolist() == [3 * b + 5, 3 * (2 + a)]
    assert Factor(2, (("a", 3), ("b", 1))).size({"a": 4, "b": 6}) == 2 + 12 + 6


def test_a_count_that_is_no_multiple_of_its_sizes_is_an_error():
    with pytest.raises(AssertionError, match="a count of 7 is no multiple of its dimensions 4"):
        Polynomial.build({"a": 4}, [Term(7, [Factor(0, (("a", 1),))], "one")])


def test_the_cost_of_latency_needs_a_table():
    nothing = Polynomial.build({"a": 4}, [])
    assert nothing.value(np.array([4])) == 0
    with pytest.raises(AssertionError, match="only where a table was measured"):
        CostModel({"a": 4}, nothing, nothing, nothing).of("latency")
