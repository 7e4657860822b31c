"""Candidate widths of all groups in one table, and coordinate descent over them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from passdeploy.channels.groups import ChannelMap
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
