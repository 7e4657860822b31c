"""Convert a float32 ONNX file to fp16, bf16, int8 or fp8, with the layers that hurt accuracy left in float32.

A converted graph that fails its accuracy gate is made again with the most sensitive layers in float32,
until it passes. casting.py and quantise.py do the conversion, layer_ranking.py chooses the layers.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto
from torch import Tensor

from passdeploy.errors import ExportError, ParityError
from passdeploy.export.artifact import Artifact
from passdeploy.export.batches import run_in_batches
from passdeploy.export.casting import cast_graph, castable_nodes
from passdeploy.export.layer_ranking import Converted, convert_until_it_passes
from passdeploy.export.onnx_graph import write_onnx
from passdeploy.export.ort_session import open_session
from passdeploy.export.parity import gate_problem, measure_parity, open_rounding_emulation, open_unoptimised
from passdeploy.export.precision import CAST_PRECISIONS, QUANTISED_PRECISIONS, Limits
from passdeploy.export.quantise import Conversion, Quantiser, int8_conversion, modelopt_conversion, quantisable_nodes
from passdeploy.export.reference import Reference
from passdeploy.runtime.events import Stage

_RANKING_IMAGES = 32


def convert_file(
    source: Path,
    path: Path,
    precision: str,
    *,
    calibration: Tensor,
    reference: Reference | None,
    limits: Limits,
    quantiser: Quantiser = "ort",
    progress: Stage | None = None,
) -> Artifact:
    """Write `path`, the graph of `source` in `precision`. The result may still fail its gate: `require_parity` decides.

    Args:
        source: a float32 ONNX file, as `export_onnx` writes it.
        path: where to write.
        precision: fp16, bf16, int8 or fp8.
        calibration: images in the form the graph accepts, (n, 3, height, width): quantisation takes its ranges from
            them, and layers are ranked by the error they cause on them.
        reference: the model's answers to compare with; None converts every layer, unchecked.
        limits: the largest allowed differences from the reference.
        quantiser: for int8; fp8 always uses ModelOpt.
        progress: receives a step for each layer that is measured, if any have to be.

    Raises:
        ExportError: the network has no layer that can have the precision.

    Returns:
        The artifact. Its fact "kept" names the nodes that stayed float32 because they hurt accuracy, "kept_modules" the
        modules whose weights they read.
    """
    model = onnx.load(source)
    layers = castable_nodes(model, precision) if precision in CAST_PRECISIONS else quantisable_nodes(model)
    if not layers:
        raise ExportError(f"{path.name}: no layer of the network can be {precision}.\nExport it in another precision.")
    convert = _conversion(model, source, precision, calibration, quantiser)
    if reference is None:
        converted = Converted(convert(()), (), None, 1)
    else:
        converted = _convert_within_limits(convert, layers, source, precision, calibration, reference, limits, progress)
    artifact = write_onnx(converted.model, path, precision)
    facts: dict[str, Any] = {
        "kept": list(converted.kept),
        "kept_modules": _modules_of(model, converted.kept),
        "graphs_judged": converted.checked,
    }
    if precision in QUANTISED_PRECISIONS:
        facts["quantiser"] = quantiser if precision == "int8" else "modelopt"
    return artifact.with_facts(**facts)


def _modules_of(model: ModelProto, nodes: Collection[str]) -> list[str]:
    """Name the modules whose weights nodes read, in their order; a node without a weight keeps its own name."""
    weights = {tensor.name for tensor in model.graph.initializer}
    reads = {node.name: next((name for name in node.input if name in weights), "") for node in model.graph.node}
    return list(dict.fromkeys(reads.get(node, "").removesuffix(".weight") or node for node in nodes))


def _conversion(
    model: ModelProto, source: Path, precision: str, calibration: Tensor, quantiser: Quantiser
) -> Conversion:
    """Return the function that makes the graph in `precision`, given the nodes to keep in float32."""
    if precision in CAST_PRECISIONS:

        def cast(keep: Collection[str]) -> ModelProto:
            return cast_graph(model, precision, keep=keep)

        return cast
    if precision == "int8" and quantiser == "ort":
        return int8_conversion(source, calibration)
    return modelopt_conversion(source, calibration, precision)


def _convert_within_limits(
    convert: Conversion,
    layers: tuple[str, ...],
    source: Path,
    precision: str,
    calibration: Tensor,
    reference: Reference,
    limits: Limits,
    progress: Stage | None,
) -> Converted[ModelProto]:
    """Convert all layers of a graph but the fewest, most sensitive ones that have to stay float32 for `limits`."""

    def open_converted(model: ModelProto) -> Any:
        if precision in CAST_PRECISIONS:
            return open_rounding_emulation(model)
        return open_unoptimised(model) if precision == "fp8" else open_session(model, threads=torch.get_num_threads())

    def find_problem(model: ModelProto) -> str | None:
        try:
            return gate_problem(measure_parity(open_converted(model), reference), limits)
        except ParityError as error:
            return str(error)

    images = (calibration if len(calibration) else reference.batches[-1].images)[:_RANKING_IMAGES]
    exact = open_session(source, threads=torch.get_num_threads())
    expected = run_in_batches(exact, images, usual=_RANKING_IMAGES)

    def measure_error(model: ModelProto) -> float:
        actual = run_in_batches(open_converted(model), images, usual=_RANKING_IMAGES)
        error = float((actual - expected).norm())
        return error if error == error else float("inf")  # NaN cannot be sorted

    return convert_until_it_passes(convert, layers, find_problem, measure_error, progress=progress)
