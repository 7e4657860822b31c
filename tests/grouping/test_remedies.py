"""Tests of what a search learns from those before it."""

from __future__ import annotations

import pytest

from passdeploy.grouping.remedies import Remedies
from passdeploy.grouping.shape_check import Stop
from passdeploy.tracing.trace import OpRecord


def stop(module: str = "body.head", error: str = "shape '[1, 80, -1]' is invalid") -> Stop:
    record = OpRecord("aten.view", ("body", module), "net.py:7", (), (), (), False, False)
    return Stop(12, record, error)


def test_what_helped_is_known_and_nothing_else():
    remedies = Remedies()
    remedies.remember(stop(), ("width", "width"))
    assert remedies.of(stop()) == ("width", "width")
    assert remedies.of(stop(error="another")) is None
    assert not remedies.none_helps(stop(), ())


@pytest.mark.parametrize(
    ("chosen_in", "is_tried_again"),
    [
        ((), False),
        (("neck",), False),
        (("body.header",), False),
        (("body.head",), True),
        (("body",), True),
        (("neck", "body.head.m"), True),
    ],
)
def test_where_nothing_helped_all_is_tried_again_only_after_another_choice_there(
    chosen_in: tuple[str, ...], is_tried_again: bool
):
    remedies = Remedies()
    remedies.give_up(stop())
    assert remedies.none_helps(stop(), chosen_in) is not is_tried_again
    assert not remedies.none_helps(stop(error="another"), chosen_in)


def test_code_outside_of_all_modules_is_tried_again():
    remedies, outside = Remedies(), Stop(0, OpRecord("aten.view", (), "net.py:7", (), (), (), False, False), "wrong")
    remedies.give_up(outside)
    assert remedies.none_helps(outside, ())
    assert not remedies.none_helps(outside, ("body",))
