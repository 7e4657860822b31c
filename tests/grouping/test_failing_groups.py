"""Tests of the search for the groups of a plan that make a network differ: the right ones, in few comparisons."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import cast

import pytest

from passdeploy.channels.plan import Plan
from passdeploy.grouping.failing_groups import MAX_BISECTION_TRIALS, Comparison, FailingGroups


class FakeComparison:
    """Comparison that differs where a plan cuts all groups of one of some sets."""

    def __init__(self, *failing: AbstractSet[int]) -> None:
        self._failing, self.plans = failing, list[Plan]()

    def is_exact(self, plan: Plan) -> bool:
        self.plans.append(plan)
        return not any(together <= set(map(int, plan.kept)) for together in self._failing)


def found(comparison: FakeComparison, groups: int = 100) -> list[int]:
    plan = Plan({str(number): (0,) for number in range(groups)})
    return sorted(map(int, FailingGroups(cast(Comparison, comparison), plan).names()))


@pytest.mark.parametrize("culprit", [0, 1, 41, 98, 99])
def test_one_group_is_found_in_a_logarithm_of_comparisons(culprit: int):
    comparison = FakeComparison({culprit})
    assert found(comparison) == [culprit]
    assert len(comparison.plans) <= 9  # 7 halvings, its neighbour, and the rest


def test_neighbours_cost_one_comparison_each():
    comparison = FakeComparison(*({number} for number in range(60, 68)))
    assert found(comparison) == list(range(60, 68))
    assert len(comparison.plans) <= 7 + 7 + 2


def test_groups_far_apart_are_all_found():
    assert found(FakeComparison({3}, {50}, {97})) == [3, 50, 97]


def test_of_groups_that_differ_only_together_one_is_enough():
    assert found(FakeComparison({20, 70})) == [70]
    assert found(FakeComparison({20, 70}, {10, 71}, {5})) == [5, 70, 71]


def test_a_single_group_needs_no_comparison():
    comparison = FakeComparison({0})
    assert found(comparison, groups=1) == [0]
    assert not comparison.plans


def test_after_too_many_comparisons_all_that_is_left_is_named():
    comparison = FakeComparison(*({number} for number in range(0, 100, 2)))
    names = found(comparison)
    assert set(range(0, 100, 2)) <= set(names)
    assert len(comparison.plans) <= MAX_BISECTION_TRIALS + 2
