"""Export a PyTorch model to one ONNX file, and check the opset, the batch dimension and the inputs of the result.

The exporter is torch's own (torch.export, then onnxscript's optimiser, which folds batch norms: the TensorRT
parser refuses the unfolded graph). It can change the opset or fix the batch dimension without an error, so both
are checked here. parity.py compares the outputs with the model's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.errors import ExportError, UsageError, first_line
from passdeploy.export.artifact import Artifact, BatchRange, describe_artifact
from passdeploy.export.casting import find_opset
from passdeploy.export.precision import EXPORTED_OPSETS, choose_opset
from passdeploy.export.quiet import quietly
from passdeploy.export.zero_additions import remove_zero_additions_
from passdeploy.models.modes import evaluating
from passdeploy.runtime.files import atomic_path
from passdeploy.runtime.versions import __version__

INPUT, OUTPUT, BATCH = "images", "logits", "batch"

DEFAULT_OPSET = 20  # read by every TensorRT that we support
_LARGEST_FILE_BYTES = 2**31 - 1  # protobuf's limit for one file

# Metadata of the exporter that is of no use on another machine: source lines (with paths of the exporting
# machine) and its intermediate graph. The module scopes stay.
_MACHINE_METADATA = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node", "pkg.torch.export.")


def export_onnx(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    path: str | Path,
    *,
    opset: int = DEFAULT_OPSET,
    batch: Sequence[int] = (1, 8, 32),
    metadata: Mapping[str, Any] | None = None,
) -> Artifact:
    """Write `model` in eval mode to one ONNX file with the input "images" and the output "logits".

    The model itself is not changed, training flags included.

    Args:
        model: takes one tensor, returns one tensor of shape (batch, classes).
        example_inputs: float images, shape (any, 3, height, width); only the shape past the batch counts.
        path: where to write; weights are inside the file.
        opset: the ONNX operator set, 18 to 23.
        batch: (min, opt, max). The batch dimension is open, unless min equals max.
        metadata: written to the file's metadata; values that are not text are written as JSON.

    Raises:
        UsageError: `batch`, `opset` or `example_inputs` is invalid.
        ExportError: the model cannot be exported, or not with this opset or an open batch.
    """
    sizes = BatchRange.of(batch)
    choose_opset("fp32", opset)
    example = _example_batch(model, example_inputs, sizes)
    with torch.no_grad(), evaluating(model), quietly():
        proto = _convert(model, example, opset, is_fixed=sizes.is_fixed)
    remove_zero_additions_(proto)
    _require_requested(proto, opset, sizes, model)
    _remove_machine_paths(proto)
    _annotate(proto, {**(metadata or {}), "batch": sizes.as_list(), "passdeploy_version": __version__})
    return write_onnx(proto, Path(path), "fp32")


def write_onnx(proto: Any, path: Path, precision: str) -> Artifact:
    """Write a graph atomically as one file, with its precision in the metadata.

    Raises:
        ExportError: the graph is not valid ONNX, or does not fit in one file.
    """
    _annotate(proto, {"precision": precision})
    _require_valid(proto, path.name)
    with atomic_path(path) as draft:
        draft.write_bytes(proto.SerializeToString(deterministic=True))
    dims = [dim.dim_param or dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    batch = next((json.loads(entry.value) for entry in proto.metadata_props if entry.key == "batch"), None)
    facts = {"opset": find_opset(proto), "batch": batch, "input": dims, "nodes": len(proto.graph.node)}
    return describe_artifact(path, kind="onnx", precision=precision, facts=facts)


def _example_batch(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...], sizes: BatchRange) -> Tensor:
    """Repeat one image to a batch to trace with; at least 2 for an open batch, since tracing makes a 1 constant."""
    images = example_inputs if isinstance(example_inputs, Tensor) else example_inputs[0]
    if not isinstance(example_inputs, Tensor) and len(example_inputs) != 1:
        raise UsageError(f"the model must take one tensor of images; {len(example_inputs)} inputs were given.")
    if images.dim() < 2 or len(images) == 0:
        raise UsageError(f"example_inputs must be a batch of images (n, 3, height, width), not {tuple(images.shape)}.")
    size = sizes.largest if sizes.is_fixed else 2
    weight = next(model.parameters(), images)
    return images[:1].detach().to(weight.device).repeat(size, *[1] * (images.dim() - 1))


def _convert(model: nn.Module, example: Tensor, opset: int, *, is_fixed: bool) -> Any:
    """Run torch's exporter and return an `onnx.ModelProto`."""
    from passdeploy.export.onnx_operators import TRANSLATIONS  # imports onnxscript, which is slow

    try:
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            optimize=True,
            verbose=False,
            external_data=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=None if is_fixed else ({0: BATCH},),
            custom_translation_table=dict(TRANSLATIONS),
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"{type(model).__name__} cannot be exported to ONNX: {_root_cause(error)}\n"
            "Look in its forward: an operator without an ONNX form, or Python that depends on the data."
        ) from error
    if program is None:
        raise ExportError(f"torch's exporter returned nothing for {type(model).__name__}.")
    return program.model_proto


def _require_requested(proto: Any, opset: int, sizes: BatchRange, model: nn.Module) -> None:
    """Raise ExportError unless the graph has the requested opset, one input, one output and the requested batch."""
    name = type(model).__name__
    produced, (oldest, newest) = find_opset(proto), EXPORTED_OPSETS
    if produced != opset:
        raise ExportError(
            f"asked for ONNX opset {opset}, torch's exporter produced {produced} for {name}.\n"
            f"Ask for opset {produced}, or for another one between {oldest} and {newest}."
        )
    if len(proto.graph.input) != 1 or len(proto.graph.output) != 1:
        raise ExportError(
            f"{name} has {len(proto.graph.input)} inputs and {len(proto.graph.output)} outputs.\n"
            "Export a model that takes one tensor of images and returns one tensor of logits."
        )
    for value in (proto.graph.input[0], proto.graph.output[0]):
        first = value.type.tensor_type.shape.dim[0]
        if not sizes.is_fixed and first.dim_param != BATCH:
            raise ExportError(
                f"{name} fixes the batch of {value.name!r} at {first.dim_value or first.dim_param}.\n"
                "Its forward makes the batch size a constant: use x.flatten(1) or x.shape[0] there."
            )


def _require_valid(proto: Any, name: str) -> None:
    """Raise ExportError unless the graph is valid ONNX and small enough for one file."""
    import onnx

    if proto.ByteSize() > _LARGEST_FILE_BYTES:
        raise ExportError(
            f"the ONNX graph takes {proto.ByteSize() / 1e9:.1f} GB and one file holds 2.1 GB.\n"
            "Prune the model further before exporting it."
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the graph for {name} is not valid ONNX: {first_line(error)}") from error


def _remove_machine_paths(proto: Any) -> None:
    """Remove metadata with paths of the exporting machine, so that the same model gives the same bytes anywhere."""
    owners = [proto, proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output]
    for owner in [*owners, *proto.graph.value_info, *proto.graph.initializer]:
        kept = [note for note in owner.metadata_props if not note.key.startswith(_MACHINE_METADATA)]
        if len(kept) < len(owner.metadata_props):
            kept = [type(note).FromString(note.SerializeToString()) for note in kept]
            del owner.metadata_props[:]
            owner.metadata_props.extend(kept)


def _annotate(proto: Any, metadata: Mapping[str, Any]) -> None:
    """Write `metadata` to the graph; entries of the same name are replaced."""
    kept = [(entry.key, entry.value) for entry in proto.metadata_props if entry.key not in metadata]
    del proto.metadata_props[:]
    for key, value in kept:
        proto.metadata_props.add(key=key, value=value)
    for key, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value)
        proto.metadata_props.add(key=key, value=text)


def _root_cause(error: BaseException) -> str:
    """Describe the innermost exception in one line; the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"
