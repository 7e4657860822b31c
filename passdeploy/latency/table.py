"""Latency table of a network: measured times of its layers, from which the latency at any widths is predicted.

It is made on the target machine, saved as a file of plain numbers, and used wherever the network is pruned. The file
holds measurements; models are fitted to them when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np

from passdeploy.channels.blocks import Block, presence, skipped_in
from passdeploy.channels.costs import Factor
from passdeploy.errors import CorruptArtifact, RunError
from passdeploy.latency.layer_model import LayerModel, non_negative_least_squares
from passdeploy.latency.measurement_context import MeasurementContext
from passdeploy.latency.network_timing import NetworkTiming
from passdeploy.latency.size_inference import SizeExplainer, infer_sizes
from passdeploy.profiling.kernel_times import NodeTime, module_of
from passdeploy.runtime.files import atomic_path

FORMAT = 1
_FOLDS = 6  # of the cross-validation
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


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Measured times of a network's layers, with the models that are fitted to them.

    Attributes:
        context: machine, backend and settings of the measurements.
        widths: group name -> width in the dense network; and `presence` of the blocks that it knows -> 1.
        block: channels that kernels of the backend compute together.
        nodes: of the network, in the order of a call.
        measurements: the networks that were measured, the dense one first: widths (groups not named are whole), and
            milliseconds of a call.
        times: milliseconds of every node in every network, shape (nodes, measurements), scaled so that the nodes of
            a network add up to its call.
        estimated: numbers of the networks of which only the nodes were timed, in another backend; the time of their
            call is estimated from those.
    """

    context: MeasurementContext
    widths: Mapping[str, int]
    block: int
    nodes: tuple[Node, ...]
    measurements: tuple[tuple[Mapping[str, int], float], ...]
    times: np.ndarray
    estimated: frozenset[int] = frozenset()

    @classmethod
    def build(
        cls,
        context: MeasurementContext,
        widths: Mapping[str, int],
        block: int,
        timings: Sequence[NetworkTiming],
        blocks: Sequence[Block] = (),
    ) -> LatencyTable:
        """Infer the sizes and blocks of every node and spread the measured times over the nodes.

        Args:
            context: machine, backend and settings of the measurements.
            widths: group name -> width in the dense network.
            block: channels that kernels of the backend compute together.
            timings: of networks of different widths and blocks, the dense one first; a call of nan milliseconds is
                estimated.
            blocks: that may be skipped.
        """
        estimated = frozenset(number for number, timing in enumerate(timings) if isnan(timing.total_ms))
        if estimated:
            timings = estimate_calls(timings)
        whole = [timing for timing in timings if not skipped_in(timing.widths)]
        nodes = tuple(
            replace(node, blocks=_blocks_of(node, blocks)) for node in _nodes_with_sizes(widths, block, whole)
        )
        times = _node_times([node.name for node in nodes], timings)
        measurements = tuple((dict(timing.widths), timing.total_ms) for timing in timings)
        sizes = {**widths, **{presence(one.name): 1 for one in blocks}}
        return cls(context, sizes, block, nodes, measurements, times, estimated)

    @cached_property
    def model(self) -> NetworkModel:
        """Model fitted to all measurements."""
        return self._fit(range(len(self.measurements)))

    @property
    def dense_ms(self) -> float:
        """Measured milliseconds of the dense network."""
        return self.measurements[0][1]

    def node_ms(self, widths: Mapping[str, int]) -> np.ndarray:
        """Predict milliseconds of every node at `widths`, shape (nodes,)."""
        uncorrected = self.model.nodes_ms(self.nodes, {**self.widths, **widths})
        total = float(uncorrected.sum())
        corrected: np.ndarray = uncorrected * (self.model.network_ms(total) / total)
        return corrected

    def predict_ms(self, widths: Mapping[str, int]) -> float:
        """Predict milliseconds of the network at `widths`; groups not named are whole."""
        return float(self.node_ms(widths).sum())

    @cached_property
    def error(self) -> tuple[float, float]:
        """Median and largest relative error of predictions, by cross-validation over the measured networks.

        Every network is predicted by a model of the others; a sixth of them is left out at a time.
        """
        timed = [number for number in range(len(self.measurements)) if number not in self.estimated]
        errors = []
        for fold in range(min(_FOLDS, len(timed))):
            left_out = timed[fold::_FOLDS]
            model = self._fit([number for number in range(len(self.measurements)) if number not in left_out])
            for number in left_out:
                widths, total = self.measurements[number]
                predicted = model.network_ms(float(model.nodes_ms(self.nodes, {**self.widths, **widths}).sum()))
                errors.append(abs(predicted / total - 1))
        return float(np.median(errors)), float(max(errors))

    def _fit(self, measurements: Sequence[int]) -> NetworkModel:
        """Fit a model to some of the measurements, given by index.

        The same kernel takes longer in a large network than in a small one, whose weights are still in a cache from
        the call before. The layer models and the exponent of this effect are fitted in turns.
        """
        widths = [{**self.widths, **self.measurements[number][0]} for number in measurements]
        times, exponent = self.times[:, list(measurements)], 0.0
        reference = float(np.median(times.sum(0)))
        totals = np.ones(len(measurements))  # predicted, without the correction
        for _ in range(_FIT_ROUNDS):
            layers = self._layers(widths, times / (totals / reference) ** exponent)
            model = NetworkModel(layers, reference, exponent)
            totals = np.array([model.nodes_ms(self.nodes, network).sum() for network in widths])
            residual = np.log(times.sum(0) / (totals * (totals / reference) ** exponent))
            slope = _slope(np.log(totals / reference), residual)
            exponent = float(np.clip(exponent + slope, -_MAX_EXPONENT, _MAX_EXPONENT))
        return model

    def _layers(self, widths: Sequence[Mapping[str, int]], times: np.ndarray) -> dict[str, LayerModel]:
        """Fit a model to each distinct layer; `times` has shape (nodes, networks)."""
        models = {}
        for layer, numbers in _by_layer(self.nodes).items():
            timed = [
                (node, column)
                for node in numbers
                for column, network in enumerate(widths)
                if self.nodes[node].is_there(network)
            ]
            sizes = [[size.size(widths[column]) for size in self.nodes[node].sizes] for node, column in timed]
            shaped = np.array(sizes, np.int64).reshape(len(sizes), len(self.nodes[numbers[0]].sizes))
            models[layer] = LayerModel.fit(shaped, np.array([times[key] for key in timed]), self.block)
        return models

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values."""
        return {
            "format": FORMAT,
            "place": self.context.to_json(),
            "groups": dict(self.widths),
            "block": self.block,
            "dense_ms": self.dense_ms,
            "error": dict(zip(("median", "largest"), self.error, strict=True)),
            "nodes": [
                {
                    "name": node.name,
                    "layer": node.layer,
                    "sizes": [
                        {"fixed": size.fixed, "spans": [list(span) for span in size.spans]} for size in node.sizes
                    ],
                    "blocks": list(node.blocks),
                    "ms": [float(f"{ms:.5g}") for ms in times],
                }
                for node, times in zip(self.nodes, self.times, strict=True)
            ],
            "looks": [{"widths": dict(widths), "ms": ms} for widths, ms in self.measurements],
            "estimated": sorted(self.estimated),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> LatencyTable:
        """Read what `to_json` wrote; KeyError, TypeError or ValueError where it is something else."""
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}, known is {FORMAT}")
        nodes = tuple(
            Node(
                str(entry["name"]),
                str(entry["layer"]),
                tuple(
                    Factor(int(size["fixed"]), tuple((str(name), int(span)) for name, span in size["spans"]))
                    for size in entry["sizes"]
                ),
                tuple(str(name) for name in entry.get("blocks", ())),
            )
            for entry in document["nodes"]
        )
        measurements = tuple(
            ({str(name): int(width) for name, width in entry["widths"].items()}, float(entry["ms"]))
            for entry in document["looks"]
        )
        times = np.array([entry["ms"] for entry in document["nodes"]], float)
        if times.shape != (len(nodes), len(measurements)) or not (times >= 0).all():
            raise ValueError("times that do not fit")
        widths = {str(name): int(width) for name, width in document["groups"].items()}
        followed = {name for node in nodes for size in node.sizes for name, _ in size.spans}
        if unknown := {*followed, *(name for node in nodes for name in node.blocks)} - set(widths):
            raise ValueError(f"a size that follows {sorted(unknown)[0]!r}, which is no group")
        context = MeasurementContext.from_json(document["place"])
        estimated = frozenset(int(number) for number in document.get("estimated", ()))
        return cls(context, widths, int(document["block"]), nodes, measurements, times, estimated)

    def save(self, path: Path) -> None:
        """Write the table as one JSON file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as draft:
            draft.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            RunError: there is no such file.
            CorruptArtifact: the file is no latency table.
        """
        if not path.is_file():
            raise RunError(f"there is no latency table {path}.\nMake it on the target: passdeploy profile --table")
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptArtifact(
                f"{path} is no latency table: {error}.\nMake it again: passdeploy profile --table"
            ) from error


def _nodes_with_sizes(widths: Mapping[str, int], block: int, timings: Sequence[NetworkTiming]) -> tuple[Node, ...]:
    """Infer the layer signature and the variable sizes of every node of the dense network."""
    in_all = set.intersection(*({node.name for node in timing.nodes} for timing in timings))
    vectors = {name: np.array([timing.widths.get(name, full) for timing in timings]) for name, full in widths.items()}
    explainer, nodes = SizeExplainer(vectors, block), list[Node]()
    for node in timings[0].nodes:
        layer, sizes = node.kind, tuple[Factor, ...]()
        if node.sizes is not None:
            layer, sizes = infer_sizes([node], explainer)
        elif node.name in in_all:
            same = [next(other for other in timing.nodes if other.name == node.name) for timing in timings]
            layer, sizes = infer_sizes(same, explainer)
        nodes.append(Node(node.name, layer, sizes))
    return tuple(nodes)


def _blocks_of(node: Node, blocks: Sequence[Block]) -> tuple[str, ...]:
    """Return `presence` of the blocks that a node goes with, by the module that it is named after."""
    module = module_of(node.name)
    return tuple(presence(block.name) for block in blocks if module and block.holds(module))


def _node_times(names: Sequence[str], timings: Sequence[NetworkTiming]) -> np.ndarray:
    """Spread the time of each untraced call over the nodes of the dense network, shape (nodes, networks)."""
    row = {name: number for number, name in enumerate(names)}
    times = np.zeros((len(row), len(timings)))
    scale, extra = _untraced(timings)
    for number, timing in enumerate(timings):
        pending = 0.0  # ms of nodes that the dense network lacks (changes of layout); added to the next node
        for node in timing.nodes:
            if node.name in row:
                times[row[node.name], number] += max(scale * node.ms + extra, 0.0) + pending
                pending = 0.0
            else:
                pending += max(scale * node.ms + extra, 0.0)
        times[-1, number] += pending
        times[:, number] *= timing.total_ms / times[:, number].sum()
    return times


def estimate_calls(timings: Sequence[NetworkTiming]) -> list[NetworkTiming]:
    """Estimate the calls of which only the nodes were timed, and convert all nodes to parts of a call.

    The nodes were timed in another backend, operator by operator. Convolutions and products run there in the same
    libraries; the operators between them are fused here, into them or into each other. So a call takes a constant, a
    multiple of the former and another multiple of the latter, which are fitted to the calls that were timed.
    """
    sums = np.array([[_weighted_ms(timing), sum(node.ms for node in timing.nodes), 1.0] for timing in timings])
    sums[:, 1] -= sums[:, 0]
    total = np.array([timing.total_ms for timing in timings])
    timed = ~np.isnan(total)
    factors = non_negative_least_squares(sums[timed] / total[timed, None], np.ones(timed.sum()))
    calls = np.where(timed, total, np.maximum(sums @ factors, 1e-6))
    converted = []
    for timing, call in zip(timings, calls.tolist(), strict=True):
        rest = factors[2] / len(timing.nodes)
        nodes = tuple(
            replace(node, ms=rest + factors[0 if _has_weight(node) else 1] * node.ms) for node in timing.nodes
        )
        converted.append(replace(timing, total_ms=call, nodes=nodes))
    return converted


def _weighted_ms(timing: NetworkTiming) -> float:
    """Add up the milliseconds of the nodes with a weight."""
    return sum(node.ms for node in timing.nodes if _has_weight(node))


def _has_weight(node: NodeTime) -> bool:
    """Test whether a node is a convolution or a product of matrices."""
    return any(word in node.kind for word in ("conv", "linear", "addmm", "matmul", "bmm"))


def _untraced(timings: Sequence[NetworkTiming]) -> tuple[float, float]:
    """Fit the factor and the addend that turn a node's traced milliseconds into its part of an untraced call.

    Tracing adds time to every node, and misses the time between nodes; both are proportional to the number of nodes.
    The line through (mean node, total / nodes) of all networks is fitted robustly against disturbed measurements.
    """
    mean = np.array([sum(node.ms for node in timing.nodes) / len(timing.nodes) for timing in timings])
    total = np.array([timing.total_ms / len(timing.nodes) for timing in timings])
    scale = float(np.clip(_slope(mean, total), 0.5, 2.0)) if len(timings) > 2 else float(np.median(total / mean))
    return scale, float(np.median(total - scale * mean))


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Estimate the slope of a line through points by Theil and Sen, which tolerates outliers."""
    first, second = np.triu_indices(len(x), 1)
    apart = np.abs(x[first] - x[second]) > max(0.1 * np.ptp(x), 1e-9)
    first, second = first[apart], second[apart]
    return float(np.median((y[first] - y[second]) / (x[first] - x[second]))) if apart.any() else 0.0


def _by_layer(nodes: Sequence[Node]) -> dict[str, list[int]]:
    """Group the indices of nodes by layer signature."""
    rows: dict[str, list[int]] = {}
    for number, node in enumerate(nodes):
        rows.setdefault(node.layer, []).append(number)
    return rows
