"""Channel labels and their union-find: which channels can only be removed together, and which must stay.

Every index along every dimension of every parameter and buffer gets one label, a positive integer. During a traced
forward pass labels of channels that depend on each other are joined, and labels of channels that must stay are
protected. The labels of one set are one removable channel.

`NONE` stands for "not a removable channel": a pixel of the input, padding, a fixed table.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

NONE = 0


@dataclass(frozen=True)
class Reason:
    """The reason why a channel must stay, and where it arose."""

    text: str
    op: str = ""
    module: str = ""
    source: str = ""  # file:line of the model's own code

    def __str__(self) -> str:
        location = " in ".join(part for part in (self.op, self.module) if part)
        return self.text + (f" ({location})" if location else "") + (f" at {self.source}" if self.source else "")


class LabelUnionFind:
    """A union-find over labels, vectorised over tensors of them, with a list of protected labels and reasons."""

    def __init__(self) -> None:
        self._parent = np.zeros(1, np.int64)  # NONE is its own root
        self._protections: list[tuple[np.ndarray, Reason]] = []
        self.version = 0  # a different number for every state of joins and protections
        self._versions = count(1)

    @property
    def size(self) -> int:
        """The number of labels, NONE included."""
        return len(self._parent)

    def new_labels(self, count: int) -> Tensor:
        """Create labels; returns them in ascending order, shape (count,)."""
        labels = np.arange(len(self._parent), len(self._parent) + count)
        self._parent = np.concatenate([self._parent, labels])
        return torch.from_numpy(labels)

    def find(self, labels: Tensor) -> Tensor:
        """Return the root (representative) of each label; same shape."""
        return torch.from_numpy(np.asarray(self._roots(labels.numpy())))

    def _roots(self, labels: np.ndarray) -> np.ndarray:
        roots: np.ndarray = self._parent[labels]
        while (roots != (above := self._parent[roots])).any():
            roots = above
        return roots

    def join(self, first: Tensor, second: Tensor, reason: Reason) -> None:
        """Join two vectors of labels entry by entry; a label opposite NONE is protected for `reason`."""
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
            # Where one root would get several parents, it gets the lowest; the next round joins the others.
            np.minimum.at(self._parent, high, low)

    def copy(self) -> LabelUnionFind:
        """Copy the joins and protections; versions stay unique among a union-find and its copies."""
        other = copy.copy(self)  # shares the counter of versions
        other._parent, other._protections = self._parent.copy(), list(self._protections)
        return other

    def join_rows(self, rows: Tensor, reason: Reason) -> Tensor:
        """Join each row of `rows` (count, width) into one label; returns one label a row, shape (count,)."""
        first = rows.amax(1)  # a label if the row has one, since NONE is the lowest number
        self.join(first[:, None].expand_as(rows).reshape(-1), rows.reshape(-1), reason)
        return first

    def protect(self, labels: Tensor, reason: Reason) -> None:
        """Protect these labels and all that they are or will be joined with."""
        self._protect(labels.numpy().reshape(-1), reason)

    def _protect(self, labels: np.ndarray, reason: Reason) -> None:
        labels = labels[labels != NONE]
        if len(labels):
            self.version = next(self._versions)
            self._protections.append((np.unique(labels), reason))

    def protections(self) -> tuple[np.ndarray, list[Reason]]:
        """Find the protected sets of labels.

        Returns:
            For every root the index of the first reason that protects it, or -1, shape (size,); and the reasons.
        """
        first = np.full(self.size, -1)
        reasons = [reason for _, reason in self._protections]
        if reasons:
            order = np.repeat(np.arange(len(reasons)), [len(labels) for labels, _ in self._protections])
            roots = self._roots(np.concatenate([labels for labels, _ in self._protections]))
            first[roots[::-1]] = order[::-1]  # the last one written stays, which is the first reason
        return first, reasons

    def modules_that_protect(self, roots: np.ndarray) -> set[str]:
        """Return the modules in which a channel of one of the sets `roots` was protected."""
        if not len(roots):
            return set()
        is_given = np.zeros(self.size, bool)
        is_given[roots] = True
        return {reason.module for labels, reason in self._protections if is_given[self._roots(labels)].any()}

    def _are_joined(self, labels: Tensor) -> bool:
        roots = self._roots(labels.numpy().reshape(-1))
        return bool((roots == roots[0]).all())

    def collapse_to_one_dim(
        self, element_labels: Tensor, reason: Reason, *, rank: int = 0
    ) -> tuple[dict[int, Tensor], int]:
        """Turn one label per element into labels along one prunable dimension.

        What is left of a tensor must be a dense tensor, so only whole slices along a dimension can be removed. Where
        labels vary along several dimensions they are joined across all but one.

        Args:
            element_labels: one label for every element of a tensor, same shape as that tensor.
            reason: why a label must stay that fills the whole tensor, or that is joined with NONE.
            rank: index of the dimension to keep prunable, those that leave the most channels first.

        Returns:
            At most one entry, dimension -> labels along it, and the number of dimensions to choose from.
        """
        if not element_labels.numel():
            return {}, 0
        for dim in range(element_labels.ndim):  # most dimensions are expanded: drop them first, which is quick
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
            # Of two that leave as many channels, the later one: where queries, keys and values of three heads are
            # stacked, the heads.
            varying.sort(key=lambda dim: (_count_components(rows(roots, dim)), dim), reverse=True)
        free = varying[min(rank, len(varying) - 1)]
        return {free: self.join_rows(rows(element_labels, free), reason)}, len(varying)


def _count_components(rows: Tensor) -> int:
    """Count the connected components of rows, where rows that share a label are connected."""
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
