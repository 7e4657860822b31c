"""Sizes are tracked through the code of a network, and comparisons are solved for widths that turn them."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
from torch import Tensor, nn

from passdeploy.channels.costs import Factor
from passdeploy.grouping.constraints import Constraints
from passdeploy.grouping.size_log import log_of_sizes
from passdeploy.grouping.tracked_sizes import MAX_DEPTH, ComparisonLog, Formula, TrackedSize, track
from passdeploy.grouping.width_comparisons import comparisons_in, turning_widths
from tests.grouping.test_trial_cut import traced

FIRST, SECOND = Factor(0, (("first", 1),)), Factor(2, (("second", 3),))
WIDTHS = {"first": 20, "second": 5}


def test_arithmetic_of_sizes_is_tracked():
    log = ComparisonLog()
    first, second = track(20, FIRST, log), track(17, SECOND, log)
    assert (2 * first - second // 4) % 5 == 1
    (comparison,) = log.comparisons
    assert comparison.value(WIDTHS)
    assert list(comparison.groups) == ["first", "second"]
    assert comparison.left.value({"first": 11, "second": 1}) == (2 * 11 - 5 // 4) % 5  # type: ignore[union-attr]
    assert {17: "a size is a key like any integer"}[second]
    assert first + 0.5 == 20.5


def test_long_sums_of_sizes_end_as_plain_integers():
    log = ComparisonLog()
    total = sum((track(20, FIRST, log) for _ in range(1000)), 0)
    assert total == 20_000
    assert type(total) is not TrackedSize or total.depth <= MAX_DEPTH
    assert all(comparison.value(WIDTHS) in (True, False) for comparison in log.comparisons)


def test_tuples_of_sizes_are_compared_one_by_one():
    log = ComparisonLog()
    shape, other = (2, track(20, FIRST, log), 8), (2, track(17, SECOND, log), 8)
    assert shape != other
    assert list(log.comparisons) == [Formula(operator.eq, FIRST, SECOND)]


@pytest.mark.parametrize(
    ("comparison", "turned"),
    [
        (Formula(operator.eq, FIRST, SECOND), lambda first, second: first == 2 + 3 * second),
        (Formula(operator.lt, FIRST, SECOND), lambda first, second: first < 2 + 3 * second),
        (Formula(operator.gt, FIRST, 9), lambda first, second: first <= 9),
        (Formula(operator.ne, Formula(operator.mod, FIRST, 4), 0), lambda first, second: first % 4),
    ],
)
def test_widths_turn_a_comparison(comparison: Formula, turned: Callable[[int, int], bool]):
    found = list(turning_widths(comparison, WIDTHS))
    assert found
    for widths in found:
        both = {**WIDTHS, **widths}
        assert turned(both["first"], both["second"])
        assert all(1 <= width <= WIDTHS[name] for name, width in widths.items())


@pytest.mark.parametrize(
    "comparison", [Formula(operator.eq, FIRST, FIRST), Formula(operator.eq, FIRST, 21), Formula(operator.gt, SECOND, 4)]
)
def test_a_comparison_that_no_plan_turns_has_no_such_widths(comparison: Formula):
    assert list(turning_widths(comparison, WIDTHS)) == []


class Asking(nn.Module):
    """A network that compares sizes of tensors, attributes of layers, and sizes of images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits."""
        if x.shape[2] != x.shape[3] or len(x) > 64:
            raise ValueError("images are square, and few")
        x = self.norm(self.conv(x))
        scale = 2 if x.size(dim=1) > self.norm.num_features // 2 else 3
        return self.head(x.mean((2, 3)) * scale if self.head.in_features == 8 else x.mean((2, 3)))


def test_comparisons_of_widths_are_found_in_the_code_of_a_network():
    network = traced(Asking())
    found = comparisons_in(log_of_sizes(network, Constraints(network.trace.union_find)))
    width = Factor(0, (("conv", 1),))
    half = Formula(operator.floordiv, width, 2)
    assert found == [
        Formula(operator.gt, width, half),
        Formula(operator.eq, width, half),
        Formula(operator.eq, width, 8),
    ]
