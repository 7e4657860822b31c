"""Constraints on how a network may be cut: joined and protected channels, and size attributes that must be updated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from passdeploy.channels.groups import SizeAttribute
from passdeploy.grouping.tied_widths import WidthEquality
from passdeploy.tracing.labels import NONE, LabelUnionFind, Reason


@dataclass(frozen=True)
class LabelledSize:
    """A size attribute that must follow a dimension."""

    attribute: SizeAttribute
    labels: Tensor  # along the dimension whose size the attribute states


@dataclass(frozen=True, eq=False)
class Constraints:
    """The conditions under which a cut network runs, as far as they are known; methods return extended copies."""

    labels: LabelUnionFind  # must not be changed, since several constraints may share it
    size_attributes: tuple[LabelledSize, ...] = ()
    equality_keys: tuple[tuple[str, ...], ...] = ()  # of the width equalities that `labels` contains

    def with_size_attributes(self, sizes: Sequence[LabelledSize]) -> Constraints:
        """Add size attributes; one that was there already now follows the new dimension."""
        new = {size.attribute for size in sizes}
        others = (size for size in self.size_attributes if size.attribute not in new)
        return replace(self, size_attributes=(*others, *sizes))

    def with_equality(self, equality: WidthEquality) -> Constraints:
        """Join the pairs of a width equality, except those with a channel that must stay."""
        labels = self.labels.copy()
        is_protected = labels.protections()[0] >= 0  # (labels,)
        for longer, shorter in equality.pairs:
            roots = labels.find(torch.cat([longer, shorter])).numpy()
            if not is_protected[roots].any() and NONE not in longer and NONE not in shorter:
                repeated = shorter.repeat(len(longer) // len(shorter))
                labels.join(longer, repeated, Reason("as wide as channels that must stay"))
        return replace(self, labels=labels, equality_keys=(*self.equality_keys, equality.key))

    def with_protected(self, channels: Tensor, reason: Reason) -> Constraints:
        """Protect the channels with these labels, shape (channels,)."""
        labels = self.labels.copy()
        labels.protect(channels, reason)
        return replace(self, labels=labels)
