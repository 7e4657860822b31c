"""Which layers must stay in higher precision for an artifact to pass its gate, and no more than those.

Each layer is lowered alone and judged by the error it makes; then the layers that make the most are
kept, as few of them as pass: the number doubles until the gate is passed and is then narrowed down by halving.
One layer at least is lowered.
The ranking needs no labels and uses calibration images; only the number of layers is chosen by the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from onnx import ModelProto

from passdeploy.export.quantise import Conversion
from passdeploy.runtime.events import Stage

ProblemFinder = Callable[[ModelProto], str | None]  # what is wrong with a graph; None where it passes
ErrorMeasure = Callable[[ModelProto], float]  # the error of a graph; larger is worse


@dataclass(frozen=True)
class Converted:
    """A graph in lower precision and what it took to pass."""

    model: ModelProto
    kept: tuple[str, ...]  # nodes in higher precision, the most sensitive first
    problem: str | None  # what is wrong with it, where nothing passes that lowers at least one layer
    tried: int  # graphs that were judged


def convert_until_it_passes(
    convert: Conversion, layers: Sequence[str], find_problem: ProblemFinder, measure_error: ErrorMeasure, *, progress: Stage | None = None
) -> Converted:
    """Lower all layers; where that does not pass, all but the most sensitive ones.

    Args:
        lower: makes the graph in which the named nodes are kept.
        layers: names of the nodes that can be lowered.
        judge: what is wrong with a graph, or None.
        measure: the error of a graph; called once for each layer, on the graph where it alone is lowered.
        progress: hears of every layer that was measured.
    """
    everything = convert(())
    problem = find_problem(everything)
    most = len(layers) - 1  # a graph in which every layer is kept would not be in lower precision at all
    if problem is None or most < 1:
        return Converted(everything, (), problem, 1)
    ranked = rank_layers(convert, layers, measure_error, progress)

    tried = 1
    found: tuple[int, ModelProto] | None = None
    failed, count = 0, 1
    while found is None:
        count = min(count, most)
        candidate = convert(ranked[:count])
        tried += 1
        if find_problem(candidate) is None:
            found = (count, candidate)
        elif count == most:
            return Converted(everything, (), problem, tried)
        else:
            failed, count = count, 2 * count
    while found[0] - failed > 1:
        count = (failed + found[0]) // 2
        candidate = convert(ranked[:count])
        tried += 1
        if find_problem(candidate) is None:
            found = (count, candidate)
        else:
            failed = count
    return Converted(found[1], tuple(ranked[: found[0]]), None, tried)


def rank_layers(convert: Conversion, layers: Collection[str], measure_error: ErrorMeasure, progress: Stage | None = None) -> list[str]:
    """The layers by the error that each makes alone, the worst first."""
    errors: dict[str, float] = {}
    for done, name in enumerate(layers, start=1):
        errors[name] = measure_error(convert([other for other in layers if other != name]))
        if progress is not None:
            progress.step(done, len(layers), error=errors[name])
    return sorted(errors, key=lambda name: -errors[name])
