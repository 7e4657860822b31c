"""Exported files, each checked against the model it came from."""

from passdeploy.export.artifact import Artifact, BatchRange
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.export.parity import Parity, check_parity
from passdeploy.export.run_export import export_artifacts
from passdeploy.export.trt_engine import build_engine, load_trt

__all__ = [
    "Artifact",
    "BatchRange",
    "Parity",
    "build_engine",
    "check_parity",
    "export_artifacts",
    "export_onnx",
    "load_trt",
]
