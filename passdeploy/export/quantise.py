"""From a float32 ONNX graph to one with int8 (or fp8) weights and activations, as Q/DQ pairs TensorRT accepts.

TensorRT wants symmetric quantisation: no zero points, weights per output channel, and pairs at the *inputs* of
convolutions, products and sums only, so that a convolution still fuses with its bias and activation. int8 is
ONNX Runtime's quantiser with these settings, or ModelOpt's; fp8 is ModelOpt's alone.

Calibration runs once; graphs with more layers kept in float32 are then made from the same ranges.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import onnx
from onnx import ModelProto
from torch import Tensor

from passdeploy.errors import ExportError, UsageError, first_line, require
from passdeploy.export.onnx_graph import INPUT
from passdeploy.export.quiet import quietly

Quantiser = Literal["ort", "modelopt"]
Conversion = Callable[[Collection[str]], ModelProto]  # names of nodes to keep in float32 -> the graph without them

QUANTISED_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add")
_CALIBRATION_BATCH = 16  # all activations of one batch are in memory at a time


def int8_conversion(onnx_path: Path, images: Tensor) -> Conversion:
    """How to make int8 graphs of a float32 file, calibrated on `images` (n, 3, height, width), as the file takes them.

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
            str(onnx_path), list(QUANTISED_OPERATORS), augmented_model_path=str(Path(scratch) / "augmented.onnx"),
            calibrate_method=quantization.CalibrationMethod.MinMax, extra_options={"symmetric": True},
        )  # fmt: skip
        calibrator.collect_data(_CalibrationReader(images))
        ranges = calibrator.compute_data()
        del calibrator

    def convert(keep: Collection[str]) -> ModelProto:
        copy = ModelProto()
        copy.CopyFrom(source)
        with quietly():
            quantiser = quantization.QDQQuantizer(
                copy, True, False, quantization.QuantType.QInt8, quantization.QuantType.QInt8, ranges, [],
                list(keep), list(QUANTISED_OPERATORS),
                {
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                    "OpTypesToExcludeOutputQuantization": list(QUANTISED_OPERATORS),
                },
            )  # fmt: skip
            quantiser.quantize_model()
            quantiser.model.topological_sort()  # it appends its nodes at the end
        made: ModelProto = quantiser.model.model
        return made

    return convert


def modelopt_conversion(onnx_path: Path, images: Tensor, precision: str) -> Conversion:
    """The same with NVIDIA ModelOpt, for int8 or fp8; it calibrates anew each time.

    Raises:
        UsageError: there are no images to calibrate on.
        MissingExtra: ModelOpt is not installed.
        ExportError (when lowering): ModelOpt cannot do it.
    """
    if len(images) == 0:
        raise UsageError(f"{precision} needs real images to calibrate on, and there are none.")
    require("onnxruntime.quantization", extra="cpu")
    with quietly(), _undo_monkeypatching("onnxruntime.quantization"):
        quantization = require("modelopt.onnx.quantization", extra="quant")

    def convert(keep: Collection[str]) -> ModelProto:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "quantised.onnx"
            try:
                with quietly(), _undo_monkeypatching("onnxruntime.quantization"):
                    quantization.quantize(
                        onnx_path=str(onnx_path), quantize_mode=precision, calibration_data={INPUT: images.numpy()},
                        calibration_method="max", calibration_eps=["cpu"], high_precision_dtype="fp32",
                        nodes_to_exclude=[f"^{name}$" for name in keep], output_path=str(path),
                    )  # fmt: skip
            except Exception as error:  # its errors share no base class
                raise ExportError(f"ModelOpt cannot make {onnx_path.name} {precision}: {first_line(error)}") from error
            return onnx.load(path)

    return convert


@contextmanager
def _undo_monkeypatching(package: str) -> Iterator[None]:
    """What is exchanged inside in a package's modules, their classes and tables, is afterwards what it was.

    ModelOpt does that to ONNX Runtime's quantiser, which then fails when it is used by itself.
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
    """The nodes that would be quantised, by name, in the order of the graph."""
    return tuple(node.name for node in model.graph.node if node.op_type in QUANTISED_OPERATORS)


class _CalibrationReader:
    """ONNX Runtime's `CalibrationDataReader`, by duck typing: its module is imported only where it is installed."""

    def __init__(self, images: Tensor) -> None:
        self._batches: Iterator[Tensor] = iter(images.split(_CALIBRATION_BATCH))

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by input name, None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.get_next, None)
