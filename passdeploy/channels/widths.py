"""The widths that a channel group can be cut to: multiples of a step, down to a minimum."""

from __future__ import annotations

from math import gcd

import numpy as np

from passdeploy.channels.groups import ChannelGroup

STRICT_KINDS = ("latency",)  # kinds for which less than a block of channels saves nothing


def width_step(group: ChannelGroup, round_to: int) -> int:
    """The smallest number of channels of `group` whose layer width is a multiple of `round_to`.

    A group that spans several output channels per channel (a flattened map, a grouped convolution) needs fewer. A layer
    that is narrower than two steps goes by the largest power of two that still leaves it a choice.
    """
    step = round_to // gcd(round_to, group.span)
    if 2 * step <= group.width:
        return step
    return 1 << (max(1, group.width // 2).bit_length() - 1)


def candidate_widths(group: ChannelGroup, round_to: int, *, is_strict: bool = False) -> np.ndarray:
    """The widths that `group` may have, ascending; the last one is its own.

    Args:
        group: to be cut.
        round_to: layer widths become multiples of this.
        is_strict: every layer that is wider than one step goes in whole steps, where else a layer of less than two
            goes in smaller ones: for a kernel that computes blocks of channels, what is left of a block saves nothing.
            Below one block other kernels may run, so narrower layers go in its half and its quarter.
    """
    if not is_strict:
        step = width_step(group, round_to)
        return np.array([*range(step, group.width, step), group.width])
    step = round_to // gcd(round_to, group.span)
    if group.width > step:
        return np.array([*range(step, group.width, step), group.width])
    return np.array(sorted({group.width, *(part for part in (step // 4, step // 2) if 0 < part < group.width)}))


def minimum_width(group: ChannelGroup, round_to: int, kind: str = "macs") -> int:
    """The least that may be kept of `group` under a budget of `kind`: one step."""
    return int(candidate_widths(group, round_to, is_strict=kind in STRICT_KINDS)[0])
