"""Export to ONNX, TensorRT, Torch-TensorRT and Triton; each exported file is compared with its PyTorch model."""

from passdeploy.export.artifact import Artifact, BatchRange
from passdeploy.export.exporter import export_artifacts
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.export.parity import Parity, check_parity
from passdeploy.export.settings import ExportSettings, Samples
from passdeploy.export.trt_api import load_trt
from passdeploy.export.trt_engine import EngineOptions, build_engine
from passdeploy.export.trt_sidecar import load_engine

__all__ = [
    "Artifact",
    "BatchRange",
    "EngineOptions",
    "ExportSettings",
    "Parity",
    "Samples",
    "build_engine",
    "check_parity",
    "export_artifacts",
    "export_onnx",
    "load_engine",
    "load_trt",
]
