"""Rank layers by the error they cause, and keep as few in float32 as the accuracy gate requires.

Each layer is converted alone, and the error that this causes is measured. The layers with the largest errors then
stay in float32: their number doubles until the graph passes its gate, and a binary search finds the smallest one.
At least one layer is converted. The ranking needs no labels, only calibration images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from passdeploy.runtime.events import Stage

Graph = TypeVar("Graph")  # an ONNX model, or a PyTorch graph
Conversion = Callable[[Collection[str]], Graph]  # names of the nodes to leave in float32 -> the converted graph
ProblemFinder = Callable[[Graph], str | None]  # graph -> the reason why it fails its gate; None if it passes
ErrorMeasure = Callable[[Graph], float]  # graph -> its error; larger is worse


@dataclass(frozen=True)
class Converted(Generic[Graph]):
    """A converted graph, and the layers that stayed in float32 so that it passes."""

    model: Graph
    kept: tuple[str, ...]  # names of nodes left in float32, the most sensitive first
    problem: str | None  # the reason why it fails its gate, where no graph with a converted layer passes
    checked: int  # number of graphs that were checked against the gate


def convert_until_it_passes(
    convert: Conversion[Graph],
    layers: Sequence[str],
    find_problem: ProblemFinder[Graph],
    measure_error: ErrorMeasure[Graph],
    *,
    progress: Stage | None = None,
) -> Converted[Graph]:
    """Convert all layers; if that graph fails its gate, all but the most sensitive ones.

    Args:
        convert: makes the graph in which the named nodes stay float32.
        layers: names of the nodes that can be converted.
        find_problem: returns the reason why a graph fails its gate, or None.
        measure_error: called once for each layer, with the graph in which it alone is converted.
        progress: receives a step for each layer that was measured.
    """
    all_converted = convert(())
    problem = find_problem(all_converted)
    most = len(layers) - 1  # at least one layer must be converted
    if problem is None or most < 1:
        return Converted(all_converted, (), problem, 1)
    ranked = rank_layers(convert, layers, measure_error, progress)

    checked = 1
    passing: tuple[int, Graph] | None = None  # number of kept layers, graph
    failed, count = 0, 1
    while passing is None:
        count = min(count, most)
        candidate = convert(ranked[:count])
        checked += 1
        if find_problem(candidate) is None:
            passing = (count, candidate)
        elif count == most:
            return Converted(all_converted, (), problem, checked)
        else:
            failed, count = count, 2 * count
    while passing[0] - failed > 1:
        count = (failed + passing[0]) // 2
        candidate = convert(ranked[:count])
        checked += 1
        if find_problem(candidate) is None:
            passing = (count, candidate)
        else:
            failed = count
    return Converted(passing[1], tuple(ranked[: passing[0]]), None, checked)


def rank_layers(
    convert: Conversion[Graph],
    layers: Collection[str],
    measure_error: ErrorMeasure[Graph],
    progress: Stage | None = None,
) -> list[str]:
    """Sort layers by the error that each causes when it alone is converted, the largest first."""
    errors: dict[str, float] = {}
    for done, name in enumerate(layers, start=1):
        errors[name] = measure_error(convert([other for other in layers if other != name]))
        if progress is not None:
            progress.step(done, len(layers), error=errors[name])
    return sorted(errors, key=lambda name: -errors[name])
