"""Blocks as values: what a plan says of them, what goes with them, and how they are written down."""

from __future__ import annotations

import json

import pytest

from passdeploy.channels.blocks import Block, Replacement, chosen_blocks, presence, replacements_of, tensors_of
from passdeploy.channels.costs import CostModel, Factor, Term
from passdeploy.channels.plan import Plan
from passdeploy.errors import PlanError

OUTER = Block(
    "outer",
    replacements=(Replacement("outer", "identity"),),
    tensors=("outer.inner.weight", "outer.fc.weight"),
    groups=("outer.inner", "outer.fc"),
    contains=("outer.inner",),
)
INNER = Block(
    "outer.inner",
    replacements=(Replacement("outer.inner", "zero", 4),),
    tensors=("outer.inner.weight",),
    groups=("outer.inner",),
)
STAGE = Block("stage", reason="the shape changes")
BLOCKS = (OUTER, INNER, STAGE)


def test_a_plan_skips_blocks_that_the_network_has_and_that_may_go():
    Plan({}, ("outer", "outer.inner")).check((), BLOCKS)
    with pytest.raises(PlanError, match="must stay: the shape changes"):
        Plan({}, ("stage",)).check((), BLOCKS)
    with pytest.raises(PlanError, match="no such block"):
        Plan({}, ("other",)).check((), BLOCKS)
    with pytest.raises(PlanError, match="no blocks of the network were given"):
        Plan({}, ("outer",)).check(())
    with pytest.raises(PlanError, match="twice"):
        Plan({}, ("outer", "outer")).check((), BLOCKS)


def test_a_plan_is_written_and_read():
    plan = Plan({"stem": (0, 2)}, ("outer",))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_replacement_is_written_and_read():
    for one in (*OUTER.replacements, *INNER.replacements):
        assert Replacement.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert Replacement("a", "identity").to_json() == ["a", "identity", 0, 0]


def test_what_is_inside_of_a_skipped_block_goes_with_it_once():
    assert replacements_of(BLOCKS, ("outer.inner", "outer")) == list(OUTER.replacements)
    assert replacements_of(BLOCKS, ("outer.inner",)) == list(INNER.replacements)
    assert tensors_of(BLOCKS, ("outer.inner", "outer")) == {"outer.inner.weight", "outer.fc.weight"}


def test_names_of_modules_are_not_taken_for_those_they_begin():
    assert Block("1", replacements=(Replacement("layer.1", "identity"),)).holds("layer.1.conv")
    assert not Block("1", replacements=(Replacement("layer.1", "identity"),)).holds("layer.10")


def test_patterns_protect_blocks():
    chosen = chosen_blocks(BLOCKS, include=("outer*",), exclude=("*.inner",))
    inner = "excluded by '*.inner'"
    assert [block.reason for block in chosen] == [f"{inner} (outer.inner)", inner, "the shape changes"]
    by_layer = chosen_blocks(BLOCKS, exclude=("*.fc",), layers=("outer.fc", "stage.fc"))
    assert [block.reason for block in by_layer] == ["excluded by '*.fc' (outer.fc)", "", "the shape changes"]
    assert chosen_blocks(BLOCKS, include=("stage",))[0].reason == "not included"


def test_the_cost_of_a_plan_leaves_skipped_blocks_out_at_their_present_widths():
    stream, hidden = Factor(0, (("stem", 1),)), Factor(0, (("outer.inner", 1),))
    costs = CostModel.build(
        {"stem": 8, "outer.inner": 4, "outer.fc": 2},
        macs=[Term(80, [stream], "stem"), Term(320, [stream, hidden], "outer.inner"), Term(16, [], "outer.fc")],
        params=[Term(8, [stream], "stem.weight"), Term(32, [stream, hidden], "outer.inner.weight")],
        channels=[Term(8, [stream], "stem"), Term(4, [hidden], "outer.inner")],
        blocks=BLOCKS,
    )
    assert costs.of("macs") == 80 + 320 + 16
    narrow, no_outer, no_inner = {"stem": 4, "outer.inner": 1}, {presence("outer"): 0}, {presence("outer.inner"): 0}
    assert costs.of("macs", no_inner) == 80 + 16
    assert costs.of("macs", {**narrow, **no_outer}) == 40
    assert costs.of("macs", {**narrow, **no_outer, **no_inner}) == 40
    assert costs.of("params", {"outer.inner": 3, **no_outer}) == 8
    assert costs.of("channels", no_inner) == 8
    assert costs.of("macs", Plan({"stem": (0, 3, 5, 6), "outer.inner": (2,)}, ("outer",)).widths()) == 40
    dense, of_inner = costs.vector({}), list(costs.widths).index(presence("outer.inner"))
    assert costs.macs.gradient(dense)[of_inner] == 320  # what the block costs
    assert presence("stage") not in costs.widths
