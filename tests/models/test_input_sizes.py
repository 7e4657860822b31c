"""Further sizes of inputs, at which code may do something else."""

from __future__ import annotations

import torch

from passdeploy.models.input_sizes import doubled, further_sizes, shapes_of


def test_further_sizes_are_one_sample_and_smaller_and_larger_images():
    found = [shapes_of(inputs) for inputs in further_sizes([torch.zeros(2, 3, 32, 64), torch.zeros(2, 5)])]
    assert found == [
        [[1, 3, 32, 64], [1, 5]],
        [[2, 3, 16, 32], [2, 5]],
        [[2, 3, 64, 128], [2, 5]],
        [[2, 3, 128, 256], [2, 5]],
        [[2, 3, 512, 1024], [2, 5]],
    ]
    assert [shapes_of(inputs) for inputs in further_sizes([torch.zeros(1, 5)])] == []


def test_lists_of_images_are_scaled_one_by_one():
    found = [shapes_of(inputs) for inputs in further_sizes([[torch.zeros(3, 32, 64), torch.zeros(3, 8, 8)]])]
    assert found[:2] == [[[3, 32, 64]], [[3, 16, 32], [3, 4, 4]]]


def test_what_has_no_samples_stays_as_it_is():
    assert doubled([torch.zeros(2, 3), 4])[1] == 4
    assert shapes_of(doubled([torch.zeros(2, 3)])) == [[4, 3]]
