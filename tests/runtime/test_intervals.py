"""Intervals of accuracies, against exact ones."""

from __future__ import annotations

import numpy as np

from passdeploy.runtime.intervals import accuracy_change_interval, accuracy_interval, paired_change_interval


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


def test_pairs_that_agree_make_the_interval_of_a_change_narrower():
    unpaired = accuracy_change_interval(0.96, 0.95, 1000)
    few, many = paired_change_interval(5, 15, 1000), paired_change_interval(40, 50, 1000)
    assert all(low < -0.01 < high for low, high in (few, many))
    assert few[1] - few[0] < many[1] - many[0] < unpaired[1] - unpaired[0] + 1e-3


def test_a_paired_interval_covers_the_true_change():
    drawn = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        right, wrong, _same = drawn.multinomial(300, [0.02, 0.04, 0.94])
        low, high = paired_change_interval(int(right), int(wrong), 300)
        covered += low <= -0.02 <= high
    assert 0.93 < covered / 2000 < 0.98
