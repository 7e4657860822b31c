"""Latency table of a network: measured times of its layers, from which the latency at any widths is predicted.

It is made on the target machine, saved as a file of plain numbers, and used wherever the network is pruned. The file
holds measurements; models are fitted to them when it is read.
"""

from __future__ import annotations

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
from passdeploy.latency.measurement_context import MeasurementContext
from passdeploy.latency.network_model import NetworkModel, Node
from passdeploy.latency.network_timing import NetworkTiming
from passdeploy.latency.node_times import estimate_calls, node_times
from passdeploy.latency.size_inference import SizeExplainer, infer_sizes
from passdeploy.profiling.kernel_times import module_of
from passdeploy.runtime.files import atomic_path
from passdeploy.runtime.sealed_json import read_sealed, sealed

FORMAT = 2  # from 2 on the file is sealed; otherwise 1 is the same
_FOLDS = 6  # of the cross-validation


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
        modules: hash of the modules of the network (`structure.py`); empty in older files, and where it was not taken.
    """

    context: MeasurementContext
    widths: Mapping[str, int]
    block: int
    nodes: tuple[Node, ...]
    measurements: tuple[tuple[Mapping[str, int], float], ...]
    times: np.ndarray
    estimated: frozenset[int] = frozenset()
    modules: str = ""

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
        times = node_times([node.name for node in nodes], timings)
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
        """Fit a model to some of the measurements, given by index."""
        widths = [{**self.widths, **self.measurements[number][0]} for number in measurements]
        return NetworkModel.fit(self.nodes, widths, self.times[:, list(measurements)], self.block)

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
            "modules": self.modules,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> LatencyTable:
        """Read what `to_json` wrote; KeyError, TypeError or ValueError where it is something else."""
        if document["format"] not in (1, FORMAT):
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
        modules = str(document.get("modules", ""))
        return cls(context, widths, int(document["block"]), nodes, measurements, times, estimated, modules)

    def save(self, path: Path) -> None:
        """Write the table as one JSON file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as draft:
            draft.write_text(sealed(self.to_json(), indent=1))

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
            return cls.from_json(read_sealed(path.read_bytes(), version_key="format", sealed_from=FORMAT))
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
