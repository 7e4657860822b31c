"""Images that became right or wrong between two networks are counted from what a run wrote down."""

from __future__ import annotations

import pytest
import torch

from passdeploy.commands.changed_answers import changed_answers, packed


@pytest.mark.parametrize("images", [1, 8, 9, 359])
def test_changes_are_counted_image_by_image(images: int):
    generator = torch.Generator().manual_seed(images)
    before, after = (torch.rand(images, generator=generator) < 0.5 for _ in range(2))
    counts = changed_answers(packed(before), after, images=images)
    assert counts is not None
    assert counts["became_right"] == sum(b and not a for a, b in zip(before.tolist(), after.tolist(), strict=True))
    assert counts["became_right"] - counts["became_wrong"] == int(after.sum() - before.sum())


def test_answers_to_other_images_are_not_compared():
    before = packed(torch.ones(359, dtype=torch.bool))  # 45 bytes, as for 357
    assert changed_answers(before, torch.ones(357, dtype=torch.bool), images=359) is None
    assert changed_answers(before, torch.ones(400, dtype=torch.bool), images=None) is None  # of an earlier version
    assert changed_answers(before, torch.ones(359, dtype=torch.bool), images=None) is not None
    assert changed_answers(None, torch.ones(30, dtype=torch.bool), images=None) is None
