"""Latency as something that widths cost, next to multiply-adds and parameters, and fast enough to plan with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from passdeploy.errors import PlanError
from passdeploy.latency.table import LatencyTable

NS_PER_MS = 1_000_000


class LatencyCost:
    """What a table says of widths, as a `Cost` in nanoseconds.

    Args:
        table: of the network.
        names: of the groups, in the order of the cost model's vectors.

    Raises:
        PlanError: the table follows a group that the network does not have.
    """

    def __init__(self, table: LatencyTable, names: Sequence[str]) -> None:
        column = {name: number for number, name in enumerate(names)}
        if unknown := sorted(set(table.widths) - set(column)):
            raise PlanError(
                f"the latency table follows group {unknown[0]!r}, which this network does not have.\n"
                "It was made for another model, or with other layers excluded."
            )
        self.table = table
        sizes = [factor for node in table.nodes for factor in node.sizes]
        self._fixed = np.array([factor.fixed for factor in sizes], np.int64)
        self._spans = np.zeros((len(sizes), len(names)), np.int64)  # of every size of every node
        for row, factor in enumerate(sizes):
            for name, span in factor.spans:
                self._spans[row, column[name]] = span
        ends = np.cumsum([len(node.sizes) for node in table.nodes]).tolist()
        self._rows = [slice(end - len(node.sizes), end) for node, end in zip(table.nodes, ends, strict=True)]
        self._memory: dict[tuple[str, tuple[int, ...]], float] = {}
        self._curves: dict[tuple[int, int, tuple[int, ...], bytes], np.ndarray] = {}
        touched = [np.flatnonzero(self._spans[rows].any(0)) for rows in self._rows]
        self._touching: list[list[int]] = [[] for _ in names]
        for node, columns in enumerate(touched):
            for group in columns.tolist():
                self._touching[group].append(node)

    def value(self, widths: np.ndarray) -> int:
        """Nanoseconds at `widths`, shape (groups,)."""
        return int(self.table.curves.stretched(self.sum(widths) / NS_PER_MS) * NS_PER_MS)

    def relaxed(self, limit: int) -> float:
        """What `sum` may be where `value` may be `limit`."""
        return self.table.curves.relaxed(limit / NS_PER_MS) * NS_PER_MS

    def sum(self, widths: np.ndarray) -> float:
        """Nanoseconds of all nodes, before what the size of the network does to them."""
        sizes = (self._fixed + self._spans @ widths).tolist()
        return sum(self._node(number, tuple(sizes[rows])) for number, rows in enumerate(self._rows))

    def gradient(self, widths: np.ndarray) -> np.ndarray:
        """Nanoseconds of one more channel of each group: the mean over the upper half of its width.

        The slope at one place would be that of a step: kernels take channels in blocks.
        """
        slope = np.zeros(len(widths))
        for group in range(len(widths)):
            half = max(1, int(widths[group]) // 2)
            if half < widths[group]:
                low, high = self.curve(widths, group, np.array([half, widths[group]]))
                slope[group] = max((high - low) / (widths[group] - half), 0.0)
        return (
            slope + 1e-3
        )  # a channel of a layer that takes no time is nearly free, not free: scores are divided by it

    def curve(self, widths: np.ndarray, group: int, candidates: np.ndarray) -> np.ndarray:
        """Nanoseconds of all nodes that a group touches, at each of the widths `candidates`, others unchanged."""
        sizes = self._fixed + self._spans @ widths
        total = np.zeros(len(candidates))
        for node in self._touching[group]:
            rows = self._rows[node]
            span = self._spans[rows, group]
            others = sizes[rows] - span * widths[group]
            key = node, group, tuple(others.tolist()), candidates.tobytes()
            if key not in self._curves:
                layer = self.table.curves.layers[self.table.nodes[node].layer]
                self._curves[key] = layer.predict(others + span * candidates[:, None]) * NS_PER_MS
            total += self._curves[key]
        return total

    def _node(self, number: int, sizes: tuple[int, ...]) -> float:
        key = self.table.nodes[number].layer, sizes
        if key not in self._memory:
            at = np.array([sizes], np.int64).reshape(1, -1)
            self._memory[key] = float(self.table.curves.layers[key[0]].predict(at)[0]) * NS_PER_MS
        return self._memory[key]
