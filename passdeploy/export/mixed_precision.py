"""From a float32 ONNX file to one in another precision that passes its gate.

Casting and quantisation know nothing of accuracy, the gate nothing of graphs; here they meet: a lowered graph
that fails its gate is made again with the most sensitive layers left in float32, until it passes.
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
from passdeploy.export.casting import cast_graph, castable_nodes
from passdeploy.export.layer_ranking import Converted, convert_until_it_passes
from passdeploy.export.onnx_graph import write_onnx
from passdeploy.export.ort_session import open_session
from passdeploy.export.parity import Reference, gate_problem, measure_parity, open_rounding_emulation, open_unoptimised
from passdeploy.export.precision import CAST_PRECISIONS, QUANTISED_PRECISIONS, Limits
from passdeploy.export.quantise import Conversion, Quantiser, int8_conversion, modelopt_conversion, quantisable_nodes
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
    """Write `path`, the graph of `source` in `precision`; parity is for the caller to require.

    Args:
        source: a float32 ONNX file, as `export_onnx` writes it.
        path: where to write.
        precision: fp16, bf16, int8 or fp8.
        calibration: images as the graph takes them, (n, 3, height, width): quantisation takes its ranges from
            them, and layers are ranked by the error they make on them.
        reference: the model's answers that the result is held to; None lowers everything, unseen.
        limits: what the result must keep.
        quantiser: of int8; fp8 is ModelOpt's in any case.
        progress: hears of every layer that is measured, where any have to be.

    Raises:
        ExportError: no layer of it can have the precision.

    Returns:
        The artifact. Its fact "kept" names the nodes that stayed float32 because they hurt.
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
    facts: dict[str, Any] = {"kept": list(converted.kept), "graphs_judged": converted.tried}
    if precision in QUANTISED_PRECISIONS:
        facts["quantiser"] = quantiser if precision == "int8" else "modelopt"
    return artifact.with_facts(**facts)


def _conversion(
    model: ModelProto, source: Path, precision: str, calibration: Tensor, quantiser: Quantiser
) -> Conversion:
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
) -> Converted:
    def open_converted(model: ModelProto) -> Any:
        if precision in CAST_PRECISIONS:
            return open_rounding_emulation(model)
        return open_unoptimised(model) if precision == "fp8" else open_session(model, threads=torch.get_num_threads())

    def find_problem(model: ModelProto) -> str | None:
        try:
            return gate_problem(measure_parity(open_converted(model), reference), limits)
        except ParityError as error:
            return str(error)

    images = (calibration if len(calibration) else reference.batches[-1].images)[:_RANKING_IMAGES].numpy()
    exact = open_session(source, threads=torch.get_num_threads())
    name = exact.get_inputs()[0].name
    (expected,) = exact.run(None, {name: images})

    def measure_error(model: ModelProto) -> float:
        (found,) = open_converted(model).run(None, {name: images})
        error = float(torch.from_numpy(found - expected).norm())
        return error if error == error else float("inf")  # NaN would not sort

    return convert_until_it_passes(convert, layers, find_problem, measure_error, progress=progress)
