"""Share of a cost that each channel group and each skipped block saved, so that the parts add up to the whole saving.

A convolution is saved by the group of its inputs and by that of its outputs together. Taken alone, the savings would
add up to more than was saved; so groups and blocks are cut one after the other, once from the first to the last and
once backwards, and the mean of both is theirs: for products of two widths, such as multiply-adds, their Shapley value.
"""

from __future__ import annotations

from collections.abc import Mapping

from passdeploy.channels.costs import CostModel


def savings_by_part(costs: CostModel, kind: str, widths: Mapping[str, int]) -> dict[str, float]:
    """Return the share of the dense network's cost that each group and each skipped block saved.

    Args:
        costs: of the network, as functions of widths.
        kind: macs, params, channels or latency.
        widths: of the slim network, as `Plan.widths` gives them; what is not named stayed whole.

    Returns:
        Name as in `widths`, so `presence` of a block -> share of the dense cost; they add up to 1 - slim / dense.
    """
    whole = costs.of(kind)
    parts = [name for name, width in widths.items() if width != costs.widths.get(name)]
    saved = dict.fromkeys(widths, 0.0)
    for order in (parts, parts[::-1]):
        cut, before = dict[str, int](), whole
        for name in order:
            cut[name] = widths[name]
            after = costs.of(kind, cut)
            saved[name] += (before - after) / 2 / whole
            before = after
    return saved
