"""Candidate widths of a channel group: multiples of a step, down to a minimum."""

from __future__ import annotations

from math import gcd

import numpy as np

from passdeploy.channels.groups import ChannelGroup

STRICT_KINDS = ("latency",)  # kinds of cost that drop only by whole blocks of channels


def width_step(group: ChannelGroup, round_to: int) -> int:
    """Compute the smallest number of channels of `group` whose layer width is a multiple of `round_to`.

    A group that spans several output channels per channel (a flattened map, a grouped convolution) needs fewer. For a
    layer narrower than two such steps it is the largest power of two that leaves at least two candidates.
    """
    step = round_to // gcd(round_to, group.span)
    if 2 * step <= group.width:
        return step
    return 1 << (max(1, group.width // 2).bit_length() - 1)


def candidate_widths(group: ChannelGroup, round_to: int, *, is_strict: bool = False) -> np.ndarray:
    """List the widths that `group` may have, ascending; the last one is its full width.

    Args:
        group: to be cut.
        round_to: layer widths become multiples of this.
        is_strict: use whole steps for every layer wider than one step; otherwise layers narrower than two steps get
            smaller ones. A kernel that computes channels in blocks takes as long for a part of a block as for the
            whole. Below one block other kernels may run, so narrower layers may have a half or a quarter of it.
    """
    if not is_strict:
        step = width_step(group, round_to)
        return np.array([*range(step, group.width, step), group.width])
    step = round_to // gcd(round_to, group.span)
    if group.width > step:
        return np.array([*range(step, group.width, step), group.width])
    return np.array(sorted({group.width, *(part for part in (step // 4, step // 2) if 0 < part < group.width)}))


def minimum_width(group: ChannelGroup, round_to: int, kind: str = "macs") -> int:
    """Return the smallest candidate width of `group` under a budget of `kind`."""
    return int(candidate_widths(group, round_to, is_strict=kind in STRICT_KINDS)[0])
