"""Model repositories for NVIDIA's Triton Inference Server, with one model for each exported network and precision.

    <repository>/<model>/config.pbtxt  labels.txt
    <repository>/<model>/1/model.onnx or model.plan

config.pbtxt is written in full, since Triton's own defaults (for ONNX a largest batch of 4) differ from what the
artifact was made for. Triton serves neither engines of TensorRT for RTX nor engines without weights; their ONNX files
are used instead.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, ValueInfoProto

from passdeploy.export.artifact import Artifact, BatchRange, describe_artifact
from passdeploy.runtime.events import Listener, Warned, silent
from passdeploy.runtime.files import atomic_path, write_atomically

_QUEUE_MICROSECONDS = 100  # the longest that a request waits for others to share its batch
_TRITON_TYPES = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.UINT8: "TYPE_UINT8",
}


def write_repository(
    folder: Path, artifacts: Sequence[Artifact], *, name: str, listener: Listener = silent
) -> list[Artifact]:
    """Write a model for each network and precision: its TensorRT engine where one was built, else its ONNX file.

    Args:
        folder: the repository; made if it does not exist.
        artifacts: ONNX files, and engines that were built from them in the same folder.
        name: of the model; precision and network are appended.
        listener: is warned of engines that Triton cannot serve for lack of weights.

    Returns:
        Every file that was written.
    """
    plans = {artifact.facts["onnx"]: artifact for artifact in artifacts if _is_plan(artifact)}
    for stripped in (artifact for artifact in artifacts if _lacks_weights(artifact)):
        text = "has no weights, which Triton would not put into it: the repository serves its ONNX file"
        listener(Warned(f"{stripped.path.name} {text}."))
    written: list[Artifact] = []
    for graph in (artifact for artifact in artifacts if artifact.kind == "onnx"):
        served = plans.get(graph.path.name, graph)
        suffix = graph.path.stem.removeprefix("model").strip("-")
        written += _write_model(folder, f"{name}-{suffix}" if suffix else name, served, graph)
    return written


def _is_plan(artifact: Artifact) -> bool:
    """True if Triton can serve the artifact as a TensorRT plan."""
    return artifact.kind == "engine" and artifact.facts["flavour"] == "tensorrt" and not _lacks_weights(artifact)


def _lacks_weights(artifact: Artifact) -> bool:
    """True for an engine that gets its weights from its ONNX file when passdeploy loads it."""
    return artifact.kind == "engine" and bool(artifact.facts.get("options", {}).get("weight_stripped"))


def _write_model(folder: Path, name: str, served: Artifact, graph: Artifact) -> list[Artifact]:
    """Write one model: the file of `served`, and labels and configuration from the ONNX file of `graph`."""
    model_folder = folder / name
    model_file = model_folder / "1" / ("model.plan" if _is_plan(served) else "model.onnx")
    with atomic_path(model_file) as draft:
        shutil.copyfile(served.path, draft)
    model = onnx.load(graph.path)
    classes: list[str] = next((json.loads(entry.value) for entry in model.metadata_props if entry.key == "classes"), [])
    files = [model_file]
    if classes:
        write_atomically(model_folder / "labels.txt", "".join(f"{' '.join(label.splitlines())}\n" for label in classes))
        files.append(model_folder / "labels.txt")
    sizes = BatchRange.of(graph.facts["batch"])
    text = config_text(name, model.graph.input[0], model.graph.output[0], sizes, _is_plan(served), bool(classes))
    write_atomically(model_folder / "config.pbtxt", text)
    files.append(model_folder / "config.pbtxt")
    return [describe_artifact(path, kind="triton", precision=served.precision, facts={"model": name}) for path in files]


def config_text(
    name: str, images: ValueInfoProto, logits: ValueInfoProto, sizes: BatchRange, is_plan: bool, has_labels: bool
) -> str:
    """Return the `config.pbtxt` of one model, in protobuf's text format.

    Dynamic batching is for models that accept every size from 1 up; for others the batch is part of the shape.
    """
    has_dynamic_batching = sizes.smallest == 1 and sizes.largest > 1
    server = 'platform: "tensorrt_plan"' if is_plan else 'backend: "onnxruntime"'
    lines = [
        f"name: {json.dumps(name)}",
        server,
        f"max_batch_size: {sizes.largest if has_dynamic_batching else 0}",
        f"input [ {{ {_tensor_text(images, has_dynamic_batching)} }} ]",
        f"output [ {{ {_tensor_text(logits, has_dynamic_batching)}{_labels_text(has_labels)} }} ]",
        f"instance_group [ {{ count: 1 kind: {'KIND_GPU' if is_plan else 'KIND_AUTO'} }} ]",
    ]
    if has_dynamic_batching:
        preferred = ", ".join(map(str, sorted({sizes.typical, sizes.largest} - {1})))
        lines.append(
            f"dynamic_batching {{ preferred_batch_size: [ {preferred} ] "
            f"max_queue_delay_microseconds: {_QUEUE_MICROSECONDS} }}"
        )
    return "\n".join(lines) + "\n"


def _tensor_text(value: ValueInfoProto, has_dynamic_batching: bool) -> str:
    """Describe an input or output in protobuf's text format, without the batch where Triton forms it."""
    kind: Mapping[Any, str] = _TRITON_TYPES
    tensor = value.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
    shown = ", ".join(map(str, dims[1:] if has_dynamic_batching else dims))
    return f"name: {json.dumps(value.name)} data_type: {kind[tensor.elem_type]} dims: [ {shown} ]"


def _labels_text(has_labels: bool) -> str:
    """Return the entry that names the file of labels, or nothing."""
    return ' label_filename: "labels.txt"' if has_labels else ""
