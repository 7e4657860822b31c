"""Intervals of accuracies, against exact ones."""

from __future__ import annotations

from passdeploy.runtime.intervals import accuracy_change_interval, accuracy_interval


def test_an_interval_holds_the_accuracy_and_narrows_with_the_images():
    few, many = accuracy_interval(0.9, 100), accuracy_interval(0.9, 10_000)
    assert few[0] < many[0] < 0.9 < many[1] < few[1]
    assert accuracy_interval(1.0, 100)[1] == 1.0
    assert 0.96 < accuracy_interval(1.0, 100)[0] < 0.97  # 0.9638 by Clopper and Pearson


def test_a_change_has_an_interval_around_it():
    low, high = accuracy_change_interval(0.95, 0.94, 1000)
    assert low < -0.01 < high
    assert -0.035 < low < -0.028  # 0.01 + 1.96 standard errors: 0.0301
    assert 0.008 < high < 0.012
