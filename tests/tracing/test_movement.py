"""Tests of labels under views: labels move with the channels, for random shapes."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passdeploy.tracing.rules.movement import _view_labels


@st.composite
def views(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Draw a shape and another with as many elements, made by dividing and merging neighbouring dimensions."""
    old = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=5))
    factors: list[int] = []
    for size in old:
        parts = draw(
            st.sampled_from([(size,), (1, size), (size, 1), *((d, size // d) for d in (2, 3) if size % d == 0)])
        )
        factors += parts
    new: list[int] = []
    for factor in factors:
        if new and draw(st.booleans()):
            new[-1] *= factor
        else:
            new.append(factor)
    return old, new


@settings(deadline=None)
@given(views(), st.data())
def test_a_view_takes_labels_where_it_takes_channels(shapes: tuple[list[int], list[int]], data: st.DataObject):
    old, new = shapes
    dim = data.draw(st.integers(0, len(old) - 1))
    vector = torch.arange(1, old[dim] + 1)
    everywhere = vector.view([-1 if d == dim else 1 for d in range(len(old))]).expand(old)
    assert torch.equal(_view_labels(vector, dim, old, new), everywhere.reshape(new))


def test_dimensions_that_a_view_does_not_merge_take_no_memory():
    rows = _view_labels(torch.arange(512), 1, (2048, 512, 3, 3), (1, 2048, 512 * 9))
    assert rows.shape == (1, 2048, 512 * 9)
    assert rows.untyped_storage().nbytes() <= 8 * math.prod((512, 9))
