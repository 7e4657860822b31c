"""Candidate widths of groups, from the layer's width and the step."""

from __future__ import annotations

import pytest
import torch

from passdeploy.channels.groups import ChannelGroup, Slot
from passdeploy.channels.widths import candidate_widths, minimum_width, width_step


def group(width: int, span: int = 1) -> ChannelGroup:
    index = torch.arange(width * span).view(width, span)
    return ChannelGroup("layer", width, (Slot("layer.weight", 0, index, is_output=True, is_input=False),))


@pytest.mark.parametrize(
    ("width", "span", "plain", "strict"),
    [
        (32, 1, [8, 16, 24, 32], [8, 16, 24, 32]),
        (20, 1, [8, 16, 20], [8, 16, 20]),
        (16, 1, [8, 16], [8, 16]),
        (12, 1, [4, 8, 12], [8, 12]),
        (15, 1, [4, 8, 12, 15], [8, 15]),
        (9, 1, [4, 8, 9], [8, 9]),
        (8, 1, [4, 8], [2, 4, 8]),
        (6, 1, [2, 4, 6], [2, 4, 6]),
        (4, 1, [2, 4], [2, 4]),
        (3, 1, [1, 2, 3], [2, 3]),
        (2, 1, [1, 2], [2]),
        (24, 2, [4, 8, 12, 16, 20, 24], [4, 8, 12, 16, 20, 24]),
        (8, 2, [4, 8], [4, 8]),  # four channels of the group are eight of the layer
        (6, 12, [2, 4, 6], [2, 4, 6]),
        (3, 8, [1, 2, 3], [1, 2, 3]),
    ],
)
def test_candidates(width: int, span: int, plain: list[int], strict: list[int]):
    one = group(width, span)
    assert candidate_widths(one, 8).tolist() == plain
    assert candidate_widths(one, 8, is_strict=True).tolist() == strict
    assert width_step(one, 8) == plain[1] - plain[0]
    assert minimum_width(one, 8) == minimum_width(one, 8, "params") == plain[0]
    assert minimum_width(one, 8, "latency") == strict[0]


def test_a_layer_of_a_single_channel_has_its_width():
    assert candidate_widths(group(1), 8).tolist() == [1]
