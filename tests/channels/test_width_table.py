"""Candidate widths of all groups in one table, and coordinate descent over them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from passdeploy.channels.blocks import Block, presence
from passdeploy.channels.costs import CostModel, Factor, Term
from passdeploy.channels.groups import ChannelGroup, ChannelMap, Slot
from passdeploy.channels.plan import Plan
from passdeploy.channels.width_table import WidthTable, coordinate_descent
from passdeploy.grouping.find import map_channels
from tests import nets


@pytest.fixture(scope="module")
def channels() -> ChannelMap:
    return map_channels(nets.Residual(), torch.zeros(1, 3, 16, 16))


@pytest.fixture(scope="module")
def table(channels: ChannelMap) -> WidthTable:
    scores = {group.name: torch.arange(1.0, group.width + 1) for group in channels.prunable}  # the last one is best
    return WidthTable.build(scores, channels.groups, channels.costs, round_to=2, is_strict=False)


def test_a_choice_becomes_widths_and_the_plan_that_keeps_the_best_channels(channels: ChannelMap, table: WidthTable):
    choice = np.zeros(len(table.names), int)
    plan = table.plan(choice)
    assert plan.widths() == {group.name: 2 for group in channels.prunable}
    assert all(plan.kept[group.name] == (group.width - 2, group.width - 1) for group in channels.prunable)
    assert table.widths(choice).tolist() == channels.costs.vector(plan.widths()).tolist()
    assert table.widths(table.full_choice()).tolist() == channels.costs.vector({}).tolist()


def test_scores_are_summed_per_candidate_and_averaged_per_step(table: WidthTable):
    width = int(table.candidates[0][-1])
    assert table.kept_score[0][0] == width + width - 1
    assert table.kept_score[0][-1] == width * (width + 1) / 2
    (first, *_), cost = table.marginal_score(np.full(len(table.names), 2.0))[0], 2.0
    assert first == (width - 2 + width - 3) / 2 / cost


def test_candidates_below_a_share_are_dropped(table: WidthTable):
    assert all((widths >= 0.5 * widths[-1]).all() for widths in table.at_least(0.5).candidates)
    assert table.at_least(1.0).full_choice().tolist() == [0] * len(table.names)


def test_coordinate_descent_ends_where_no_group_gains_by_itself(table: WidthTable):
    def value(widths: np.ndarray) -> float:
        chosen = widths[table.columns].astype(float)
        return float(-((chosen - 4) ** 2).sum() - 0.1 * chosen.prod() ** (1 / len(chosen)))

    def gain(choice: np.ndarray, group: int) -> np.ndarray:
        values = []
        for candidate in range(len(table.candidates[group])):
            changed = choice.copy()
            changed[group] = candidate
            values.append(value(table.widths(changed)))
        return np.array(values)

    choice = coordinate_descent(table, gain)
    assert [int(widths[index]) for widths, index in zip(table.candidates, choice, strict=True)] == [4] * len(choice)
    assert all(gain(choice, group).max() == value(table.widths(choice)) for group in range(len(choice)))


# With blocks

OUTER = Block("outer", groups=("inside", "within"), contains=("inner",))
INNER = Block("inner", groups=("within",))
SCORES = {
    "stem": torch.tensor([1.0, 4.0, 3.0, 2.0]),
    "inside": torch.tensor([5.0, 6.0]),
    "within": torch.tensor([9.0, 8.0, 7.0]),
    presence("outer"): torch.tensor([50.0]),
    presence("inner"): torch.tensor([30.0]),
}


def group(name: str, width: int) -> ChannelGroup:
    slot = Slot(f"{name}.weight", 0, torch.arange(width)[:, None], is_output=True, is_input=False)
    return ChannelGroup(name, width, (slot,))


@pytest.fixture(scope="module")
def nested() -> WidthTable:
    """A stem, a block with a group, and inside of it another block with a group."""
    widths = {"stem": 4, "inside": 2, "within": 3}
    terms = [Term(width, [Factor(0, ((name, 1),))], name) for name, width in widths.items()]
    costs = CostModel.build(widths, macs=terms, params=[], channels=terms, blocks=(OUTER, INNER))
    groups = [group(name, width) for name, width in widths.items()]
    return WidthTable.build(SCORES, groups, costs, round_to=1, is_strict=False)


def test_items_are_groups_then_blocks_the_inner_ones_first(nested: WidthTable):
    assert nested.names == ["stem", "inside", "within", presence("inner"), presence("outer")]
    assert nested.first_block == 3
    assert [widths.tolist() for widths in nested.candidates] == [[1, 2, 3, 4], [1, 2], [1, 2, 3], [0, 1], [0, 1]]
    assert nested.inside == [[], [], [], [2], [1, 2, 3]]
    assert nested.owners == [[], [4], [3, 4], [4], []]
    assert nested.orders[0].tolist() == [1, 2, 3, 0]


def test_a_block_is_worth_its_score_with_what_is_inside_of_it(nested: WidthTable):
    whole = nested.full_choice()
    assert whole.tolist() == [3, 1, 2, 1, 1]
    assert nested.scores_of(whole, 3).tolist() == [0, 30]
    assert nested.scores_of(np.array([0, 1, 0, 1, 1]), 3).tolist() == [0, 30 - 8 - 7]
    assert nested.scores_of(np.array([0, 1, 0, 0, 0]), 4).tolist() == [0, 50 - 30]  # without the inner block
    assert nested.score(whole) == 10 + 50  # the outer block's score is that of all inside of it
    assert nested.score(np.array([0, 1, 2, 1, 0])) == 4
    assert nested.marginal_score(np.array([1.0, 1, 1, 2, 4]))[3:] == [30 / 2, nested.scores_of(whole, 4)[-1] / 4]


def test_a_step_of_a_block_adds_all_channels_inside_of_it(nested: WidthTable):
    assert nested.channel_counts().tolist() == [1, 1, 1, 3, 2 + 3 + 1]


def test_what_is_inside_of_a_skipped_block_is_not_there(nested: WidthTable):
    skips_outer, skips_inner = np.array([1, 1, 1, 1, 0]), np.array([1, 1, 1, 0, 1])
    assert [nested.is_there(skips_inner, item) for item in range(5)] == [True, True, False, True, True]
    assert [nested.is_there(skips_outer, item) for item in range(5)] == [True, False, False, False, True]
    assert nested.with_owners(skips_outer, 1).tolist() == [1, 1, 1, 1, 1]
    assert nested.with_owners(skips_outer, 0) is skips_outer
    assert skips_outer.tolist() == [1, 1, 1, 1, 0]


def test_a_plan_of_blocks_names_the_outermost_ones(nested: WidthTable):
    assert nested.plan(np.array([1, 1, 1, 0, 1])) == Plan({"stem": (1, 2), "inside": (0, 1)}, ("inner",))
    both = nested.plan(np.array([0, 1, 1, 0, 0]))
    assert both.skipped == ("outer",)
    assert both.kept["stem"] == (1,)


def test_a_choice_is_read_from_widths(nested: WidthTable):
    assert nested.choice_of({"stem": 3, presence("outer"): 0}).tolist() == [2, 1, 2, 1, 0]
    assert nested.choice_of({"stem": 9, "within": 0}).tolist() == [3, 1, 0, 1, 1]


def test_coordinate_descent_takes_given_blocks_as_they_are(nested: WidthTable):
    seen = []

    def gain(choice: np.ndarray, item: int) -> np.ndarray:
        seen.append(item)
        return -nested.candidates[item].astype(float)  # the narrowest

    assert coordinate_descent(nested, gain).tolist() == [0, 0, 0, 0, 0]
    assert set(seen) == {0, 1, 2, 3, 4}
    seen.clear()
    assert coordinate_descent(nested, gain, np.array([3, 1, 2, 1, 0])).tolist() == [0, 0, 0, 1, 0]
    assert set(seen) == {0, 1, 2}
