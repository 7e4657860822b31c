"""Model of a network's latency: one of each layer, and a correction for the size of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from passdeploy.channels.costs import Factor
from passdeploy.latency.layer_model import LayerModel

_FIT_ROUNDS = 3
_MAX_EXPONENT = 0.3


@dataclass(frozen=True)
class Node:
    """Kernel call of the network."""

    name: str
    layer: str  # signature: nodes with equal ones share a `LayerModel`
    sizes: tuple[Factor, ...]  # that its time is a function of
    blocks: tuple[str, ...] = ()  # `presence` of the blocks that it goes with

    def is_there(self, widths: Mapping[str, int]) -> bool:
        """True if none of its blocks is skipped."""
        return all(widths[block] for block in self.blocks)


@dataclass(frozen=True, eq=False)
class NetworkModel:
    """Latency of the network: the sum of its layer models, corrected for the size of the network."""

    layers: Mapping[str, LayerModel]  # by signature
    reference_ms: float  # total of the network for which the correction is 1
    exponent: float  # the correction is (total / reference_ms) ** exponent

    @classmethod
    def fit(
        cls, nodes: Sequence[Node], widths: Sequence[Mapping[str, int]], times: np.ndarray, block: int
    ) -> NetworkModel:
        """Fit to the milliseconds of every node in networks of some widths, shape (nodes, networks).

        The same kernel takes longer in a large network than in a small one, whose weights are still in a cache from
        the call before. The layer models and the exponent of this effect are fitted in turns.
        """
        reference, exponent = float(np.median(times.sum(0))), 0.0
        totals = np.ones(len(widths))  # predicted, without the correction
        for _ in range(_FIT_ROUNDS):
            layers = _fit_layers(nodes, widths, times / (totals / reference) ** exponent, block)
            model = cls(layers, reference, exponent)
            totals = np.array([model.nodes_ms(nodes, network).sum() for network in widths])
            residual = np.log(times.sum(0) / (totals * (totals / reference) ** exponent))
            slope = robust_slope(np.log(totals / reference), residual)
            exponent = float(np.clip(exponent + slope, -_MAX_EXPONENT, _MAX_EXPONENT))
        return model

    def nodes_ms(self, nodes: Sequence[Node], widths: Mapping[str, int]) -> np.ndarray:
        """Predict milliseconds of every node without the correction, shape (nodes,)."""
        times = np.zeros(len(nodes))
        for layer, numbers in _by_layer(nodes).items():
            sizes = [[factor.size(widths) for factor in nodes[number].sizes] for number in numbers]
            times[numbers] = self.layers[layer].predict(np.array(sizes, np.int64).reshape(len(numbers), -1))
        return times * [node.is_there(widths) for node in nodes]

    def network_ms(self, nodes_ms: float) -> float:
        """Convert the sum of all nodes to the latency of the network."""
        return float(nodes_ms * (nodes_ms / self.reference_ms) ** self.exponent)

    def nodes_ms_within(self, network_ms: float) -> float:
        """Convert the latency of a network to the sum of its nodes, the inverse of `network_ms`."""
        return float(self.reference_ms * (network_ms / self.reference_ms) ** (1 / (1 + self.exponent)))


def _fit_layers(
    nodes: Sequence[Node], widths: Sequence[Mapping[str, int]], times: np.ndarray, block: int
) -> dict[str, LayerModel]:
    """Fit a model to each distinct layer; `times` has shape (nodes, networks)."""
    models = {}
    for layer, numbers in _by_layer(nodes).items():
        timed = [
            (node, column) for node in numbers for column, network in enumerate(widths) if nodes[node].is_there(network)
        ]
        sizes = [[size.size(widths[column]) for size in nodes[node].sizes] for node, column in timed]
        shaped = np.array(sizes, np.int64).reshape(len(sizes), len(nodes[numbers[0]].sizes))
        models[layer] = LayerModel.fit(shaped, np.array([times[key] for key in timed]), block)
    return models


def _by_layer(nodes: Sequence[Node]) -> dict[str, list[int]]:
    """Group the indices of nodes by layer signature."""
    rows: dict[str, list[int]] = {}
    for number, node in enumerate(nodes):
        rows.setdefault(node.layer, []).append(number)
    return rows


def robust_slope(x: np.ndarray, y: np.ndarray) -> float:
    """Estimate the slope of a line through points by Theil and Sen, which tolerates outliers."""
    first, second = np.triu_indices(len(x), 1)
    apart = np.abs(x[first] - x[second]) > max(0.1 * np.ptp(x), 1e-9)
    first, second = first[apart], second[apart]
    return float(np.median((y[first] - y[second]) / (x[first] - x[second]))) if apart.any() else 0.0
