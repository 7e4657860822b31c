"""Refit of TensorRT engines: put the weights of an ONNX file into an engine, without building it again.

An engine without weights (`--weight-stripped`) is refitted from its ONNX file each time it is loaded. No command puts
other weights into an engine that takes them (`--refittable`): that is for programs of others, with TensorRT's refitter.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from passdeploy.errors import CorruptArtifact, ExportError, RunError
from passdeploy.export.trt_api import TensorRT
from passdeploy.export.trt_log import BuilderLog, create_trt_object
from passdeploy.runtime.files import sha256_of

if TYPE_CHECKING:
    import tensorrt


def refit_(
    trt: TensorRT, engine: tensorrt.ICudaEngine, onnx_path: Path, logger: tensorrt.ILogger, log: BuilderLog, name: str
) -> None:
    """Replace the weights of a loaded engine by those of an ONNX file.

    Args:
        trt: the TensorRT that loaded the engine.
        engine: built refittable or without weights.
        onnx_path: of the graph that the engine was built from; its weights may differ.
        logger, log: TensorRT's logger, and the lines that it keeps.
        name: of the engine, in errors.

    Raises:
        ExportError: TensorRT does not accept the weights, or weights are missing.
    """
    refitter = create_trt_object(lambda: trt.Refitter(engine, logger), log)
    parser = create_trt_object(lambda: trt.OnnxParserRefitter(refitter, logger), log)
    if not parser.refit_from_file(str(onnx_path)):
        reason = parser.get_error(0).desc() if parser.num_errors else log.last_error()
        raise ExportError(f"{name} does not take the weights of {onnx_path.name}.\nTensorRT says: {reason}")
    if missing := refitter.get_missing_weights():
        raise ExportError(
            f"{onnx_path.name} lacks {len(missing)} weights of {name} (first {missing[0]!r}).\n"
            "Refit from the ONNX file that the engine was built from, or one of the same graph."
        )
    if not refitter.refit_cuda_engine():
        raise ExportError(f"{name} cannot be refitted.\nTensorRT says: {log.last_error()}")


def onnx_path_of_stripped(engine_path: Path, facts: dict[str, object], folder: Path) -> Path:
    """Return the ONNX file with the weights of an engine that has none: in `folder`, under the name in its sidecar.

    Raises:
        RunError: the file is not there.
        CorruptArtifact: it is another file than the engine was built from.
    """
    path = folder / Path(str(facts["onnx"])).name
    if not path.is_file():
        raise RunError(f"{engine_path.name} has no weights, and {path.name} is not beside it.\nCopy both files.")
    if sha256_of(path) != facts["onnx_sha256"]:
        raise CorruptArtifact(
            f"{engine_path.name} has no weights, and {path.name} beside it is not the file that it was built from.\n"
            "Copy that file, or build the engine again: passdeploy export --trt"
        )
    return path
