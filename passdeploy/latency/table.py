"""The latency table of a network: what every distinct layer takes at which sizes, and so what any plan takes.

It is made on the target, is a file of plain numbers, and is used wherever the network is pruned. What it holds are
measurements; the curves through them are drawn when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from passdeploy.channels.costs import Factor
from passdeploy.errors import CorruptArtifact, RunError
from passdeploy.latency.hardware import MeasurementContext
from passdeploy.latency.layer_model import LayerModel
from passdeploy.latency.network_timing import NetworkTiming
from passdeploy.latency.size_inference import Dictionary, sizes_of
from passdeploy.runtime.files import atomic_path

FORMAT = 1
_FOLDS = 6
_ROUNDS = 3
_MOST_BEND = 0.3


@dataclass(frozen=True)
class Node:
    """One kernel call of the network."""

    name: str
    layer: str  # signature of the kind of layer that it is
    sizes: tuple[Factor, ...]  # what its time is a function of


@dataclass(frozen=True, eq=False)
class Curves:
    """Times as functions of sizes."""

    layers: Mapping[str, LayerModel]
    middle: float  # milliseconds of the network that layers are as fast in as they say
    bend: float  # power of the total by which a larger network slows its layers down

    def nodes_ms(self, nodes: Sequence[Node], widths: Mapping[str, int]) -> np.ndarray:
        """Milliseconds of every node, shape (nodes,), in a network of middling size."""
        found = np.zeros(len(nodes))
        for layer, numbers in _by_layer(nodes).items():
            sizes = [[factor.size(widths) for factor in nodes[number].sizes] for number in numbers]
            found[numbers] = self.layers[layer].predict(np.array(sizes, np.int64).reshape(len(numbers), -1))
        return found

    def stretched(self, ms: float) -> float:
        """What nodes that add up to `ms` take as one network."""
        return float(ms * (ms / self.middle) ** self.bend)

    def relaxed(self, ms: float) -> float:
        """What the nodes of a network that takes `ms` add up to."""
        return float(self.middle * (ms / self.middle) ** (1 / (1 + self.bend)))


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Measured times of a network's layers.

    Attributes:
        place: what it was measured on, and how.
        widths: group name -> width in the dense network.
        block: channels that kernels of the backend compute together.
        nodes: of the network, in the order of a call.
        looks: the networks that were measured: widths (groups not named are whole), and milliseconds of the whole.
        times: milliseconds of every node in every look, shape (nodes, looks); what the network takes beyond its
            nodes is spread over them.
    """

    context: MeasurementContext
    widths: Mapping[str, int]
    block: int
    nodes: tuple[Node, ...]
    measurements: tuple[tuple[Mapping[str, int], float], ...]
    times: np.ndarray

    @classmethod
    def build(
        cls, context: MeasurementContext, widths: Mapping[str, int], block: int, timings: Sequence[NetworkTiming]
    ) -> LatencyTable:
        """From observations of networks of different widths, the first of them the dense one."""
        own = {node.name: number for number, node in enumerate(timings[0].nodes)}
        everywhere = set.intersection(*({node.name for node in look.nodes} for look in timings))
        vectors = {name: np.array([look.widths.get(name, full) for look in timings]) for name, full in widths.items()}
        dictionary = Dictionary(vectors, block)
        nodes, times, home = list[Node](), np.zeros((len(own), len(timings))), dict[str, int]()
        for node in timings[0].nodes:
            home[node.name] = len(nodes)
            layer, sizes = node.kind, tuple[Factor, ...]()
            if node.sizes is not None:
                layer, sizes = sizes_of([node], dictionary)
            elif node.name in everywhere:
                seen = [next(other for other in look.nodes if other.name == node.name) for look in timings]
                layer, sizes = sizes_of(seen, dictionary)
            nodes.append(Node(node.name, layer, sizes))
        scale, extra = _untraced(timings)
        for number, look in enumerate(timings):
            waiting = 0.0  # of nodes that the dense network does not have: a change of layout, paid by who needs it
            for node in look.nodes:
                if node.name in home:
                    times[home[node.name], number] += max(scale * node.ms + extra, 0.0) + waiting
                    waiting = 0.0
                else:
                    waiting += max(scale * node.ms + extra, 0.0)
            times[-1, number] += waiting
            times[:, number] *= look.total_ms / times[:, number].sum()
        measurements = tuple((dict(look.widths), look.total_ms) for look in timings)
        return cls(context, dict(widths), block, tuple(nodes), measurements, times)

    @cached_property
    def curves(self) -> Curves:
        """The curve of every distinct layer, and how the network as a whole bends them."""
        return self._fit(range(len(self.measurements)))

    @property
    def dense_ms(self) -> float:
        """What the dense network took."""
        return self.measurements[0][1]

    def node_ms(self, widths: Mapping[str, int]) -> np.ndarray:
        """What every node takes at `widths`, shape (nodes,)."""
        alone = self.curves.nodes_ms(self.nodes, {**self.widths, **widths})
        total = float(alone.sum())
        together: np.ndarray = alone * (self.curves.stretched(total) / total)
        return together

    def predict_ms(self, widths: Mapping[str, int]) -> float:
        """What the network takes at `widths`; groups not named are whole."""
        return float(self.node_ms(widths).sum())

    @cached_property
    def error(self) -> tuple[float, float]:
        """How far off it is for networks that it has not seen: median and largest relative error.

        Every look is predicted from the others, a sixth of them left out at a time.
        """
        count = len(self.measurements)
        off = []
        for fold in range(min(_FOLDS, count)):
            left_out = range(fold, count, _FOLDS)
            curves = self._fit([number for number in range(count) if number not in left_out])
            for number in left_out:
                widths, total = self.measurements[number]
                found = curves.stretched(float(curves.nodes_ms(self.nodes, {**self.widths, **widths}).sum()))
                off.append(abs(found / total - 1))
        return float(np.median(off)), float(max(off))

    def _fit(self, measurements: Sequence[int]) -> Curves:
        """Curves through some of the looks.

        The same kernel takes longer in a large network than in a small one, whose weights are still in a cache from
        the call before. By how much is found by turns: the curves, what they miss as a power of the total, and again.
        """
        widths = [{**self.widths, **self.measurements[look][0]} for look in measurements]
        times, bend = self.times[:, list(measurements)], 0.0
        middle = float(np.median(times.sum(0)))
        found = np.ones(len(measurements))
        for _ in range(_ROUNDS):
            layers = self._layers(widths, times / (found / middle) ** bend)
            curves = Curves(layers, middle, bend)
            found = np.array([curves.nodes_ms(self.nodes, at).sum() for at in widths])
            missed = np.log(times.sum(0) / (found * (found / middle) ** bend))
            bend = float(np.clip(bend + _slope(np.log(found / middle), missed), -_MOST_BEND, _MOST_BEND))
        return curves

    def _layers(self, widths: Sequence[Mapping[str, int]], times: np.ndarray) -> dict[str, LayerModel]:
        models = {}
        for layer, numbers in _by_layer(self.nodes).items():
            sizes = [[factor.size(at) for factor in self.nodes[number].sizes] for number in numbers for at in widths]
            shaped = np.array(sizes, np.int64).reshape(len(sizes), len(self.nodes[numbers[0]].sizes))
            models[layer] = LayerModel.fit(shaped, times[numbers].ravel(), self.block)
        return models

    # The file

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
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
                    "ms": [float(f"{ms:.5g}") for ms in times],
                }
                for node, times in zip(self.nodes, self.times, strict=True)
            ],
            "looks": [{"widths": dict(widths), "ms": ms} for widths, ms in self.measurements],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> LatencyTable:
        """What `to_json` wrote; KeyError, TypeError or ValueError where it is something else."""
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
            )
            for entry in document["nodes"]
        )
        measurements = tuple(
            ({str(name): int(width) for name, width in look["widths"].items()}, float(look["ms"]))
            for look in document["looks"]
        )
        times = np.array([entry["ms"] for entry in document["nodes"]], float)
        if times.shape != (len(nodes), len(measurements)) or not (times >= 0).all():
            raise ValueError("times that do not fit")
        widths = {str(name): int(width) for name, width in document["groups"].items()}
        if unknown := {name for node in nodes for size in node.sizes for name, _ in size.spans} - set(widths):
            raise ValueError(f"a size that follows {sorted(unknown)[0]!r}, which is no group")
        context = MeasurementContext.from_json(document["place"])
        return cls(context, widths, int(document["block"]), nodes, measurements, times)

    def save(self, path: Path) -> None:
        """Write it as one JSON file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as draft:
            draft.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            RunError: there is no such file.
            CorruptArtifact: it is no latency table.
        """
        if not path.is_file():
            raise RunError(f"there is no latency table {path}.\nMake it on the target: passdeploy profile --table")
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptArtifact(
                f"{path} is no latency table: {error}.\nMake it again: passdeploy profile --table"
            ) from error


def _untraced(timings: Sequence[NetworkTiming]) -> tuple[float, float]:
    """What turns a node's traced milliseconds into its part of an untraced call: a factor, and an addend.

    A tracer adds to every node, and misses what happens between them; both add up over the nodes of a call. The line
    through (mean node, total / nodes) of the networks is one that a disturbed network does not bend.
    """
    mean = np.array([sum(node.ms for node in look.nodes) / len(look.nodes) for look in timings])
    total = np.array([look.total_ms / len(look.nodes) for look in timings])
    scale = float(np.clip(_slope(mean, total), 0.5, 2.0)) if len(timings) > 2 else float(np.median(total / mean))
    return scale, float(np.median(total - scale * mean))


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """The slope of the line through points, as Theil and Sen: a few that are far off do not bend it."""
    first, second = np.triu_indices(len(x), 1)
    apart = np.abs(x[first] - x[second]) > max(0.1 * np.ptp(x), 1e-9)
    first, second = first[apart], second[apart]
    return float(np.median((y[first] - y[second]) / (x[first] - x[second]))) if apart.any() else 0.0


def _by_layer(nodes: Sequence[Node]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for number, node in enumerate(nodes):
        rows.setdefault(node.layer, []).append(number)
    return rows
