"""Precision of deployed graphs: float32 ONNX graphs in the precision that the export would give a backend.

They are for timing. int8 graphs have the quantisers of the export with ranges that were not calibrated, since no kernel
is chosen by the value of a scale; no layer is kept in float32 for the sake of accuracy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from passdeploy.export.casting import cast_graph
from passdeploy.export.precision import CAST_PRECISIONS
from passdeploy.export.quantise import quantise_uncalibrated

if TYPE_CHECKING:
    from onnx import ModelProto

DEPLOYED_PRECISIONS = ("fp32", "fp16", "bf16", "int8")
_ACTIVATION_LIMIT = 4.0  # of int8 activations


def in_precision(graph: ModelProto, precision: str) -> ModelProto:
    """Convert a float32 graph to one of `DEPLOYED_PRECISIONS`, as `export` does; fp32 is returned as it is.

    Raises:
        ExportError: the graph has control flow.
        MissingExtra: int8 without onnxruntime, whose quantiser it needs.
    """
    if precision in CAST_PRECISIONS:
        return cast_graph(graph, precision)
    return quantise_uncalibrated(graph, _ACTIVATION_LIMIT) if precision == "int8" else graph
