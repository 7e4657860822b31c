"""The exports of one model, in the order that makes each trustworthy.

ONNX first, then parity against the model, then an engine: an engine is only ever built from a graph
that was seen to compute the right thing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from passdeploy.errors import UsageError
from passdeploy.events import Listener, Warned, silent, stage
from passdeploy.export.artifact import Artifact, BatchRange
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.export.parity import check_parity
from passdeploy.export.trt_engine import Flavour, build_engine, load_trt

KINDS = ("onnx", "trt")


def export_artifacts(
    model: nn.Module,
    *,
    images: Tensor,
    folder: Path,
    which: Collection[str] = ("onnx",),
    flavour: Flavour = "tensorrt",
    batch: Sequence[int] = (1, 8, 32),
    metadata: Mapping[str, Any] | None = None,
    prefix: str = "model",
    tell: Listener = silent,
) -> list[Artifact]:
    """Write `<prefix>.onnx` and, where asked, `<prefix>.engine` or `<prefix>-rtx.engine` into `folder`.

    Args:
        model: on the CPU; left as it was.
        images: real images for the parity check, shape (n, 3, height, width), normalised.
        folder: made if it is not there.
        which: "onnx", "trt" or both; an engine needs its ONNX file, so that is written either way.
        flavour: of TensorRT; a missing one is found before anything is exported.
        batch: (min, opt, max).
        metadata: goes into the ONNX file.
        prefix: "model" for the slim network, "dense" for the other.
        tell: hears what happens.

    Raises:
        UsageError, MissingError, ExportError, ParityError: see the functions of this folder.
    """
    if unknown := sorted(set(which) - set(KINDS)):
        raise UsageError(f"cannot export {', '.join(unknown)}: choose from {', '.join(KINDS)}.")
    sizes = BatchRange.of(batch)
    if "trt" in which:
        load_trt(flavour)

    onnx_path = folder / f"{prefix}.onnx"
    with stage("export", onnx_path.name, tell) as progress:
        artifact = export_onnx(model, images, onnx_path, batch=batch, metadata=metadata)
        progress.text = f"{artifact.path.name} {artifact.size_bytes / 1e6:.1f} MB, opset {artifact.facts['opset']}"

    if find_spec("onnxruntime") is None:
        tell(Warned("onnxruntime is not installed: the ONNX file was not compared with the PyTorch model."))
    else:
        with stage("parity", f"{onnx_path.name} in ONNX Runtime", tell) as progress:
            tried = sorted({size for size in (1, 2) if sizes.smallest <= size <= sizes.largest} | {sizes.largest})
            parity = check_parity(onnx_path, model, images, batch_sizes=tried)
            artifact = artifact.with_facts(parity=parity.to_json())
            progress.text = f"error {parity.max_rel_error:.1e}, top-1 agreement {parity.top1_agreement:.1%}"
    artifacts = [artifact]

    if "trt" in which:
        engine_path = folder / (f"{prefix}-rtx.engine" if flavour == "rtx" else f"{prefix}.engine")
        with stage("engine", f"{engine_path.name} ({flavour})", tell) as progress:
            engine = build_engine(onnx_path, engine_path, flavour=flavour, batch=batch)
            progress.text = f"{engine.path.name} {engine.size_bytes / 1e6:.1f} MB, {engine.facts['layers']} layers"
        artifacts.append(engine)
    return artifacts
