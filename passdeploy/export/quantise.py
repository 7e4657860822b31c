"""Quantise a float32 ONNX graph to int8 or fp8 weights and activations, as Q/DQ pairs that TensorRT accepts.

TensorRT needs symmetric quantisation: no zero points, weights per output channel, and Q/DQ pairs only at the
*inputs* of convolutions, products and sums, so that a convolution still fuses with its bias and activation.
int8 uses ONNX Runtime's quantiser with these settings, or ModelOpt's; fp8 uses ModelOpt's.

ONNX Runtime calibrates once; graphs with more layers kept in float32 are then made from the same ranges.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import ModelProto
from torch import Tensor

from passdeploy.errors import ExportError, UsageError, first_line, require
from passdeploy.export.batches import cut_into_batches, fixed_batch
from passdeploy.export.onnx_graph import INPUT
from passdeploy.export.quiet import quietly

Quantiser = Literal["ort", "modelopt"]
Conversion = Callable[[Collection[str]], ModelProto]  # names of nodes to keep in float32 -> the converted graph

QUANTISED_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add")
_CALIBRATION_BATCH = 16  # images, where the batch is open; all activations of one batch are in memory at the same time


def int8_conversion(onnx_path: Path, images: Tensor) -> Conversion:
    """Calibrate a float32 file, and return the function that makes its int8 graphs with ONNX Runtime.

    Args:
        onnx_path: the float32 file.
        images: to calibrate on, in the form the file accepts, (n, 3, height, width).

    Raises:
        UsageError: there are no images to calibrate on.
        MissingExtra: onnxruntime is not installed.
    """
    if len(images) == 0:
        raise UsageError("int8 needs real images to calibrate on, and there are none.")
    quantization = require("onnxruntime.quantization", extra="cpu")
    source = onnx.shape_inference.infer_shapes(onnx.load(onnx_path))
    with tempfile.TemporaryDirectory() as scratch, quietly():
        calibrator = quantization.create_calibrator(
            str(onnx_path),
            list(QUANTISED_OPERATORS),
            augmented_model_path=str(Path(scratch) / "augmented.onnx"),
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options={"symmetric": True},
        )
        calibrator.collect_data(_CalibrationReader(images, fixed_batch(source)))
        ranges = calibrator.compute_data()
        del calibrator
    return lambda keep: _insert_quantisers(source, ranges, keep)


def quantise_uncalibrated(model: ModelProto, limit: float) -> ModelProto:
    """Make the int8 graph of a float32 graph for timing: nodes as after calibration, every activation in +-`limit`.

    Raises:
        MissingExtra: onnxruntime is not installed.
    """
    quantization = require("onnxruntime.quantization", extra="cpu")
    calibrate = require("onnxruntime.quantization.calibrate", extra="cpu")
    source = onnx.shape_inference.infer_shapes(model)
    bounds = {"lowest": np.array(-limit, np.float32), "highest": np.array(limit, np.float32)}
    names = [value.name for value in (*source.graph.input, *source.graph.output, *source.graph.value_info)]
    ranges = calibrate.TensorsData(
        quantization.CalibrationMethod.MinMax, {name: calibrate.TensorData(**bounds) for name in names}
    )
    return _insert_quantisers(source, ranges, ())


def _insert_quantisers(source: ModelProto, ranges: Any, keep: Collection[str]) -> ModelProto:
    """Copy a float32 graph and quantise it with ONNX Runtime's quantiser, with the ranges of its activations."""
    quantization = require("onnxruntime.quantization", extra="cpu")
    copy = ModelProto()
    copy.CopyFrom(source)
    with quietly():
        quantiser = quantization.QDQQuantizer(
            model=copy,
            per_channel=True,
            reduce_range=False,
            weight_qType=quantization.QuantType.QInt8,
            activation_qType=quantization.QuantType.QInt8,
            tensors_range=ranges,
            nodes_to_quantize=[],
            nodes_to_exclude=list(keep),
            op_types_to_quantize=list(QUANTISED_OPERATORS),
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": list(QUANTISED_OPERATORS),
            },
        )
        quantiser.quantize_model()
        quantiser.model.topological_sort()  # the quantiser appends its nodes at the end
    quantised: ModelProto = quantiser.model.model
    return quantised


def modelopt_conversion(onnx_path: Path, images: Tensor, precision: str) -> Conversion:
    """Return the function that makes int8 or fp8 graphs of a float32 file with NVIDIA ModelOpt, calibrating each time.

    Args:
        onnx_path: the float32 file.
        images: to calibrate on, in the form the file accepts, (n, 3, height, width).
        precision: int8 or fp8.

    Raises:
        UsageError: there are no images to calibrate on.
        MissingExtra: ModelOpt is not installed.
        ExportError: raised by the returned function, where ModelOpt cannot quantise the file.
    """
    if len(images) == 0:
        raise UsageError(f"{precision} needs real images to calibrate on, and there are none.")
    require("onnxruntime.quantization", extra="cpu")
    with quietly(), _undo_monkeypatching("onnxruntime.quantization"):
        quantization = require("modelopt.onnx.quantization", extra="quant")
    # ModelOpt cuts them into batches itself; they fit a fixed batch only where there is a whole number of batches.
    source = onnx.load(onnx_path)
    fixed = fixed_batch(source)
    content = torch.cat(tuple(cut_into_batches(images, fixed, usual=len(images)))).numpy()

    def convert(keep: Collection[str]) -> ModelProto:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "quantised.onnx"
            try:
                with quietly(), _undo_monkeypatching("onnxruntime.quantization"):
                    quantization.quantize(
                        onnx_path=str(onnx_path),
                        quantize_mode=precision,
                        calibration_data={INPUT: content},
                        calibration_method="max",
                        calibration_eps=["cpu"],
                        high_precision_dtype="fp32",
                        nodes_to_exclude=[f"^{name}$" for name in keep],
                        output_path=str(path),
                    )
            except Exception as error:  # ModelOpt's errors have no common base class
                raise ExportError(f"ModelOpt cannot make {onnx_path.name} {precision}: {first_line(error)}") from error
            quantised = onnx.load(path)
        del quantised.metadata_props[:]  # ModelOpt writes a new model, without those of the file
        quantised.metadata_props.extend(source.metadata_props)
        return quantised

    return convert


@contextmanager
def _undo_monkeypatching(package: str) -> Iterator[None]:
    """Restore a package's modules, their classes and dictionaries afterwards to what they were before.

    ModelOpt replaces parts of ONNX Runtime's quantiser, which then fails when it is used without ModelOpt.
    """
    modules = [module for name, module in sys.modules.items() if f"{name}.".startswith(f"{package}.")]
    values = [value for module in modules for name, value in vars(module).items() if not name.startswith("__")]
    classes = [value for value in values if isinstance(value, type) and value.__module__.startswith(package)]
    owners = [(owner, dict(vars(owner))) for owner in (*modules, *classes)]
    tables = [(table, dict(table)) for table in values if isinstance(table, dict)]
    try:
        yield
    finally:
        for owner, attributes in owners:
            for name, value in attributes.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)
        for table, entries in tables:
            table.clear()
            table.update(entries)


def quantisable_nodes(model: ModelProto) -> tuple[str, ...]:
    """Return the names of the nodes that would be quantised, in the order of the graph."""
    return tuple(node.name for node in model.graph.node if node.op_type in QUANTISED_OPERATORS)


class _CalibrationReader:
    """Batches of calibration images, with the interface of ONNX Runtime's `CalibrationDataReader`.

    It does not inherit from that class, so that this module imports without ONNX Runtime.
    """

    def __init__(self, images: Tensor, fixed: int | None) -> None:
        self._batches = cut_into_batches(images, fixed, usual=_CALIBRATION_BATCH)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch as {input name: images}, None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.get_next, None)
