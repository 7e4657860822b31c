"""Labels: names for the channels of a network, and which of them stand or fall together.

Every index along every dimension of every parameter and buffer gets one label, a positive
integer. While a forward pass is followed, labels that meet are joined, labels that must stay
are protected. What is joined in the end is one removable channel.

`NONE` stands for "not a removable channel": a pixel of the input, padding, a fixed table.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

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


class LabelUnionFind:
    """A union-find over labels that works on whole vectors at once, with a list of protections."""

    def __init__(self) -> None:
        self._parent = np.zeros(1, np.int64)  # NONE is its own root
        self._protections: list[tuple[np.ndarray, Reason]] = []
        self.version = 0  # another one for every state of who is joined with whom, and of who must stay
        self._versions = count(1)

    @property
    def size(self) -> int:
        """How many labels there are, NONE included."""
        return len(self._parent)

    def new_labels(self, count: int) -> Tensor:
        """`count` new labels, shape (count,), ascending."""
        labels = np.arange(len(self._parent), len(self._parent) + count)
        self._parent = np.concatenate([self._parent, labels])
        return torch.from_numpy(labels)

    def find(self, labels: Tensor) -> Tensor:
        """The representative of each label; same shape."""
        return torch.from_numpy(np.asarray(self._roots(labels.numpy())))

    def _roots(self, labels: np.ndarray) -> np.ndarray:
        roots: np.ndarray = self._parent[labels]
        while (roots != (above := self._parent[roots])).any():
            roots = above
        return roots

    def join(self, first: Tensor, second: Tensor, reason: Reason) -> None:
        """Join two vectors of labels entry by entry; a label that meets NONE must stay, for `reason`."""
        if first is second:
            return
        ours, theirs = first.numpy(), second.numpy()
        both = (ours != NONE) & (theirs != NONE)
        if not both.all():
            self._protect(ours[(theirs == NONE) & (ours != NONE)], reason)
            self._protect(theirs[(ours == NONE) & (theirs != NONE)], reason)
            ours, theirs = ours[both], theirs[both]
        while True:
            roots, others = self._roots(ours), self._roots(theirs)
            differ = roots != others
            if not differ.any():
                return
            self.version = next(self._versions)
            low, high = np.minimum(roots, others)[differ], np.maximum(roots, others)[differ]
            # Where one root is to go below several others, the lowest wins; the next round sees to the rest.
            np.minimum.at(self._parent, high, low)

    def save(self) -> tuple[np.ndarray, int, int]:
        """All that was joined and protected so far, to return to."""
        return self._parent.copy(), len(self._protections), self.version

    def restore(self, saved: tuple[np.ndarray, int, int]) -> None:
        """Forget what was joined and protected since it was saved."""
        parent, protections, self.version = saved
        self._parent = parent.copy()
        del self._protections[protections:]

    def join_rows(self, rows: Tensor, reason: Reason) -> Tensor:
        """Join each row of `rows` (count, width) into one label; returns one label a row, shape (count,)."""
        first = rows.amax(1)  # a label if the row holds any, since NONE is the lowest
        self.join(first[:, None].expand_as(rows).reshape(-1), rows.reshape(-1), reason)
        return first

    def protect(self, labels: Tensor, reason: Reason) -> None:
        """These labels, and whatever they are or will be joined with, must stay."""
        self._protect(labels.numpy().reshape(-1), reason)

    def _protect(self, labels: np.ndarray, reason: Reason) -> None:
        labels = labels[labels != NONE]
        if len(labels):
            self.version = next(self._versions)
            self._protections.append((np.unique(labels), reason))

    def protections(self) -> tuple[np.ndarray, list[Reason]]:
        """Who must stay.

        Returns:
            For every label that represents others: which of the reasons was the first, or -1; shape (size,). And the
            reasons.
        """
        first = np.full(self.size, -1)
        reasons = [reason for _, reason in self._protections]
        if reasons:
            numbers = np.repeat(np.arange(len(reasons)), [len(labels) for labels, _ in self._protections])
            roots = self._roots(np.concatenate([labels for labels, _ in self._protections]))
            first[roots[::-1]] = numbers[::-1]  # of several the last one written stays: the first reason
        return first, reasons

    def modules_that_protect(self, roots: np.ndarray) -> set[str]:
        """The modules in which any of the channels that `roots` represent turned out to have to stay."""
        if not len(roots):
            return set()
        asked = np.zeros(self.size, bool)
        asked[roots] = True
        return {reason.module for labels, reason in self._protections if asked[self._roots(labels)].any()}

    def _are_joined(self, labels: Tensor) -> bool:
        roots = self._roots(labels.numpy().reshape(-1))
        return bool((roots == roots[0]).all())

    def collapse_to_one_dim(
        self, element_labels: Tensor, reason: Reason, *, rank: int = 0
    ) -> tuple[dict[int, Tensor], int]:
        """The rectangle rule: a tensor must stay a box, whatever is removed from it.

        Args:
            field: one label for every element of a tensor, same shape as that tensor.
            reason: why labels that cannot be kept apart must stay.
            rank: which of several dimensions to leave free, those first that leave the most channels.

        Returns:
            At most one entry, dimension -> labels along it, and how many dimensions there were to choose from. Where
            labels vary along several dimensions they are joined across all but one.
        """
        if not element_labels.numel():
            return {}, 0
        for dim in range(element_labels.ndim):  # most dimensions are spread: drop them before looking closer
            if element_labels.stride(dim) == 0 and element_labels.size(dim) > 1:
                element_labels = element_labels.narrow(dim, 0, 1)
        if sum(size > 1 for size in element_labels.shape) == 1 and not self._are_joined(element_labels):
            dim = next(dim for dim, size in enumerate(element_labels.shape) if size > 1)
            return {dim: element_labels.reshape(-1)}, 1
        roots = self.find(element_labels)
        varying = [
            dim
            for dim in range(element_labels.ndim)
            if element_labels.size(dim) > 1 and bool((roots != roots.narrow(dim, 0, 1)).any())
        ]
        for dim in set(range(element_labels.ndim)) - set(varying):
            element_labels, roots = element_labels.narrow(dim, 0, 1), roots.narrow(dim, 0, 1)
        if not varying:
            # One label for the whole tensor: there is no dimension to remove it from.
            self.protect(element_labels.reshape(-1), reason)
            return {}, 0

        def rows(labels: Tensor, dim: int) -> Tensor:
            return labels.movedim(dim, 0).reshape(labels.size(dim), -1)

        if len(varying) > 1:
            # Of two that leave as many, the later: of a stack of three heads' queries, keys and values, the heads.
            varying.sort(key=lambda dim: (_count_components(rows(roots, dim)), dim), reverse=True)
        free = varying[min(rank, len(varying) - 1)]
        return {free: self.join_rows(rows(element_labels, free), reason)}, len(varying)


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
