"""Labels: names for the channels of a network, and which of them stand or fall together.

Every index along every dimension of every parameter and buffer gets one label, a positive
integer. While a forward pass is followed, labels that meet are joined, labels that must stay
are protected. What is joined in the end is one removable channel.

`NONE` stands for "not a removable channel": a pixel of the input, padding, a fixed table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NONE = 0


@dataclass(frozen=True)
class Reason:
    """Why a channel must stay."""

    text: str
    op: str = ""
    module: str = ""
    source: str = ""  # file:line of the model's own code

    def __str__(self) -> str:
        place = " in ".join(part for part in (self.op, self.module) if part)
        return self.text + (f" ({place})" if place else "") + (f" at {self.source}" if self.source else "")


class LabelBook:
    """A union-find over labels that works on whole vectors at once, with a list of protections."""

    def __init__(self) -> None:
        self._parent = torch.zeros(1, dtype=torch.int64)  # NONE is its own root
        self._protections: list[tuple[Tensor, Reason]] = []

    @property
    def size(self) -> int:
        """How many labels there are, NONE included."""
        return len(self._parent)

    def fresh(self, count: int) -> Tensor:
        """`count` new labels, shape (count,), ascending."""
        start = len(self._parent)
        labels = torch.arange(start, start + count)
        self._parent = torch.cat([self._parent, labels])
        return labels

    def find(self, labels: Tensor) -> Tensor:
        """The representative of each label; same shape."""
        roots = self._parent[labels]
        while not torch.equal(roots, above := self._parent[roots]):
            roots = above
        return roots

    def join(self, first: Tensor, second: Tensor, reason: Reason) -> None:
        """Join two vectors of labels entry by entry; a label that meets NONE must stay, for `reason`."""
        self.protect(torch.where(second == NONE, first, NONE), reason)
        self.protect(torch.where(first == NONE, second, NONE), reason)
        both = (first != NONE) & (second != NONE)
        first, second = first[both], second[both]
        while True:
            roots, others = self.find(first), self.find(second)
            differ = roots != others
            if not differ.any():
                return
            low = torch.minimum(roots, others)[differ]
            high = torch.maximum(roots, others)[differ]
            # Where one root is to go below several others, the lowest wins; the next round sees to the rest.
            self._parent.scatter_reduce_(0, high, low, "amin")

    def join_rows(self, rows: Tensor, reason: Reason) -> Tensor:
        """Join each row of `rows` (count, width) into one label; returns one label a row, shape (count,)."""
        first = rows.amax(1)  # a label if the row holds any, since NONE is the lowest
        self.join(first[:, None].expand_as(rows).reshape(-1), rows.reshape(-1), reason)
        return first

    def protect(self, labels: Tensor, reason: Reason) -> None:
        """These labels, and whatever they are or will be joined with, must stay."""
        labels = labels[labels != NONE]
        if len(labels):
            self._protections.append((labels.unique(), reason))

    def protected_roots(self) -> dict[int, Reason]:
        """Root -> the first reason why it must stay."""
        if not self._protections:
            return {}
        which = np.repeat(np.arange(len(self._protections)), [len(labels) for labels, _ in self._protections])
        roots = self.find(torch.cat([labels for labels, _ in self._protections])).numpy()
        found, first = np.unique(roots, return_index=True)
        return {int(root): self._protections[which[at]][1] for root, at in zip(found, first, strict=True)}

    def squeeze_to_box(self, field: Tensor, reason: Reason, *, rank: int = 0) -> tuple[dict[int, Tensor], int]:
        """The rectangle rule: a tensor must stay a box, whatever is removed from it.

        Args:
            field: one label for every element of a tensor, same shape as that tensor.
            reason: why labels that cannot be kept apart must stay.
            rank: which of several dimensions to leave free, those first that leave the most channels.

        Returns:
            At most one entry, dimension -> labels along it, and how many dimensions there were to choose from. Where
            labels vary along several dimensions they are joined across all but one.
        """
        if not field.numel():
            return {}, 0
        for dim in range(field.ndim):  # most dimensions are spread: drop them before looking closer
            if field.stride(dim) == 0 and field.size(dim) > 1:
                field = field.narrow(dim, 0, 1)
        roots = self.find(field)
        varying = [
            dim for dim in range(field.ndim) if field.size(dim) > 1 and bool((roots != roots.narrow(dim, 0, 1)).any())
        ]
        for dim in set(range(field.ndim)) - set(varying):
            field, roots = field.narrow(dim, 0, 1), roots.narrow(dim, 0, 1)
        if not varying:
            # One label for the whole tensor: there is no dimension to remove it from.
            self.protect(field.reshape(-1), reason)
            return {}, 0

        def rows(labels: Tensor, dim: int) -> Tensor:
            return labels.movedim(dim, 0).reshape(labels.size(dim), -1)

        if len(varying) > 1:
            # Of two that leave as many, the later: of a stack of three heads' queries, keys and values, the heads.
            varying.sort(key=lambda dim: (_count_components(rows(roots, dim)), dim), reverse=True)
        free = varying[min(rank, len(varying) - 1)]
        return {free: self.join_rows(rows(field, free), reason)}, len(varying)


def _count_components(rows: Tensor) -> int:
    """How many groups of rows remain when rows that share a label are one."""
    values, rows = rows.unique(return_inverse=True)
    component = torch.arange(len(rows))
    while True:
        lowest = torch.full((len(values),), len(rows)).scatter_reduce_(
            0, rows.reshape(-1), component[:, None].expand_as(rows).reshape(-1), "amin"
        )
        merged = lowest[rows].amin(1)
        if torch.equal(merged, component):
            return len(component.unique())
        component = merged
