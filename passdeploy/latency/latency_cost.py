"""Latency cost: a latency table as a fast function of widths, for the planners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from passdeploy.channels.blocks import is_presence, presence
from passdeploy.channels.costs import CostModel
from passdeploy.errors import PlanError
from passdeploy.latency.table import LatencyTable

NS_PER_MS = 1_000_000


def with_latency(costs: CostModel, table: LatencyTable) -> CostModel:
    """Add the latency of a table to the costs of its network; blocks that the table does not know must stay."""
    blocks = tuple(block for block in costs.blocks if presence(block.name) in table.widths)
    return replace(costs, latency=LatencyCost(table, costs.widths), blocks=blocks)


class LatencyCost:
    """Latency by a table, as a `Cost` in nanoseconds.

    Args:
        table: of the network.
        widths: of the groups and blocks in the dense network, in the order of the cost model's vectors.

    Raises:
        PlanError: the table names a group that the network does not have, or has with another width.
    """

    def __init__(self, table: LatencyTable, widths: Mapping[str, int]) -> None:
        _require_same_widths(table, widths)
        column = {name: number for number, name in enumerate(widths)}
        self.table = table
        sizes = [factor for node in table.nodes for factor in node.sizes]
        self._fixed = np.array([factor.fixed for factor in sizes], np.int64)
        self._spans = np.zeros((len(sizes), len(widths)), np.int64)  # of every size of every node
        for row, factor in enumerate(sizes):
            for name, span in factor.spans:
                self._spans[row, column[name]] = span
        ends = np.cumsum([len(node.sizes) for node in table.nodes]).tolist()
        self._rows = [slice(end - len(node.sizes), end) for node, end in zip(table.nodes, ends, strict=True)]
        self._node_cache: dict[tuple[str, tuple[int, ...]], float] = {}
        self._curve_cache: dict[tuple[int, int, tuple[int, ...], bytes], np.ndarray] = {}
        # A network whose blocks were not looked for has all of them.
        self._blocks = [[column[name] for name in node.blocks if name in column] for node in table.nodes]
        self._is_block = {column for blocks in self._blocks for column in blocks}
        self._nodes_of_column: list[list[int]] = [[] for _ in widths]
        for node, rows in enumerate(self._rows):
            for group in (*np.flatnonzero(self._spans[rows].any(0)).tolist(), *self._blocks[node]):
                self._nodes_of_column[group].append(node)

    def value(self, widths: np.ndarray) -> int:
        """Predict the network's nanoseconds at `widths`, shape (groups,)."""
        return int(self.table.model.network_ms(self.sum(widths) / NS_PER_MS) * NS_PER_MS)

    def sum_within(self, limit: int) -> float:
        """Convert a limit of `value` to the same limit of `sum`."""
        return self.table.model.nodes_ms_within(limit / NS_PER_MS) * NS_PER_MS

    def sum(self, widths: np.ndarray) -> float:
        """Add up the nanoseconds of all nodes, before the correction for the size of the network."""
        sizes = (self._fixed + self._spans @ widths).tolist()
        return sum(
            self._node(number, tuple(sizes[rows]))
            for number, rows in enumerate(self._rows)
            if all(widths[block] for block in self._blocks[number])
        )

    def gradient(self, widths: np.ndarray) -> np.ndarray:
        """Compute nanoseconds per channel of each group, averaged over the upper half of its width.

        Kernels compute channels in blocks, so the difference of a single channel would be zero or that of a block. For
        a block of the network it is all that goes with it.
        """
        slope = np.zeros(len(widths))
        for group in range(len(widths)):
            half = int(widths[group]) // 2 or int(group not in self._is_block)
            if half < widths[group]:
                low, high = self.curve(widths, group, np.array([half, widths[group]]))
                slope[group] = max((high - low) / (widths[group] - half), 0.0)
        return slope + 1e-3  # scores are divided by it, so it must not be zero

    def curve(self, widths: np.ndarray, group: int, candidates: np.ndarray) -> np.ndarray:
        """Predict nanoseconds of all nodes that depend on a group, at each of its `candidates`; other groups stay.

        A block is a group of the candidates 0 and 1.

        Returns:
            Shape (candidates,).
        """
        sizes = self._fixed + self._spans @ widths
        total = np.zeros(len(candidates))
        for node in self._nodes_of_column[group]:
            rows = self._rows[node]
            if not all(widths[block] for block in self._blocks[node] if block != group):
                continue
            if group in self._blocks[node]:
                total += self._node(node, tuple(sizes[rows].tolist())) * candidates
                continue
            span = self._spans[rows, group]
            others = sizes[rows] - span * widths[group]
            key = node, group, tuple(others.tolist()), candidates.tobytes()
            if key not in self._curve_cache:
                layer = self.table.model.layers[self.table.nodes[node].layer]
                self._curve_cache[key] = layer.predict(others + span * candidates[:, None]) * NS_PER_MS
            total += self._curve_cache[key]
        return total

    def _node(self, number: int, sizes: tuple[int, ...]) -> float:
        key = self.table.nodes[number].layer, sizes
        if key not in self._node_cache:
            row = np.array([sizes], np.int64).reshape(1, -1)
            self._node_cache[key] = float(self.table.model.layers[key[0]].predict(row)[0]) * NS_PER_MS
        return self._node_cache[key]


def _require_same_widths(table: LatencyTable, widths: Mapping[str, int]) -> None:
    """Raise PlanError for a group of a table that the network does not have, or not with this width."""
    for name, width in table.widths.items():
        if is_presence(name) or widths.get(name) == width:
            continue
        here = f"has {widths[name]} channels in this network" if name in widths else "this network does not have"
        raise PlanError(
            f"the latency table follows group {name!r} with {width} channels, which {here}.\n"
            "It was made for another model, or with other layers excluded."
        )
