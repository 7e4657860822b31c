"""Layer-precision counts of a TensorRT engine: how many of its layers run in which precision."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from passdeploy.errors import ExportError
from passdeploy.export.trt_api import TensorRT
from passdeploy.runtime.cuda_driver import Driver

if TYPE_CHECKING:
    import tensorrt

_CONVOLUTIONS = ("CONVOLUTION", "DECONVOLUTION")
_DATA_TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8"}
_INSPECTOR_TYPES = {
    "float": "FLOAT",
    "fp32": "FLOAT",
    "half": "HALF",
    "fp16": "HALF",
    "bf16": "BF16",
    "bfloat16": "BF16",
    "int8": "INT8",
    "fp8": "FP8",
}


def count_layer_precisions(
    trt: TensorRT,
    logger: tensorrt.ILogger,
    plan: tensorrt.IHostMemory,
    network: tensorrt.INetworkDefinition,
    driver: Driver | None,
) -> dict[str, Any]:
    """Count layers by data type: those of the engine where it loads on this machine, else those of the network.

    The network of a strongly typed build fixes every type, but only the engine shows what really runs; the
    value of "source" is "engine" or "network".
    """
    if driver is not None and driver.devices:
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        if engine is not None:
            text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
            return {"source": "engine", **count_engine_layers(text)}
    return {"source": "network", **_count_network_layers(network)}


def _count_network_layers(network: tensorrt.INetworkDefinition) -> dict[str, Any]:
    """Count a network's layers by data type; a convolution of dequantised tensors has their quantised type."""
    layers: Counter[tuple[str, str]] = Counter()
    quantised: dict[str, str] = {}  # output of a dequantisation -> the type of its input
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if not layer.num_outputs:
            continue
        kind, data_type = layer.type.name, layer.get_output(0).dtype.name
        inputs = [tensor for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None]
        if kind == "DEQUANTIZE":
            quantised[layer.get_output(0).name] = inputs[0].dtype.name
        if kind in _CONVOLUTIONS and len(inputs) > 1 and all(tensor.name in quantised for tensor in inputs[:2]):
            data_type = quantised[inputs[0].name]
        layers[kind, data_type] += 1
    return _tabulate(layers)


def count_engine_layers(inspector_json: str) -> dict[str, Any]:
    """Count an engine's layers by data type from the JSON of its inspector, of TensorRT 10 or 11.

    TensorRT 10 has a tensor's type in the field "Format/Datatype", TensorRT 11 in "Datatype".

    >>> report = '{"Layers": [{"LayerType": "CaskConvolution", "Outputs": [{"Datatype": "Half"}]}]}'
    >>> count_engine_layers(report)["convolutions"]
    {'fp16': 1}
    """
    layers: Counter[tuple[str, str]] = Counter()
    for layer in json.loads(inspector_json).get("Layers", []):
        if not isinstance(layer, dict) or not layer.get("Outputs"):
            continue
        kind = "CONVOLUTION" if "conv" in str(layer.get("LayerType", "")).lower() else str(layer.get("LayerType"))
        # An int8 convolution may have float outputs, so its inputs show the type it computes in.
        tensor = (layer.get("Inputs") or layer["Outputs"])[0] if kind == "CONVOLUTION" else layer["Outputs"][0]
        layers[kind, _parse_data_type(str(tensor.get("Datatype") or tensor.get("Format/Datatype") or ""))] += 1
    return _tabulate(layers)


def _parse_data_type(text: str) -> str:
    """Find the data type in an inspector's text, and return it as TensorRT's `DataType` spells it."""
    words = text.lower().replace("-", " ").split()
    return next((_INSPECTOR_TYPES[word] for word in words if word in _INSPECTOR_TYPES), text)


def _tabulate(layers: Counter[tuple[str, str]]) -> dict[str, Any]:
    """Add up counts by (kind, data type) to counts by precision: of all layers, and of the convolutions alone."""
    everything: Counter[str] = Counter()
    convolutions: Counter[str] = Counter()
    for (kind, data_type), count in layers.items():
        name = _DATA_TYPES.get(data_type, data_type.lower())
        everything[name] += count
        if kind in _CONVOLUTIONS:
            convolutions[name] += count
    return {"layers": dict(sorted(everything.items())), "convolutions": dict(sorted(convolutions.items()))}


def require_precision(layer_precisions: Mapping[str, Any], precision: str) -> None:
    """Raise ExportError unless a convolution (without convolutions: a layer) runs in `precision`."""
    kind = "convolutions" if layer_precisions["convolutions"] else "layers"
    counts: Mapping[str, int] = layer_precisions[kind]
    if precision not in counts:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ExportError(
            f"asked {precision}, found 0 of {sum(counts.values())} {kind} in it ({found}).\n"
            f"TensorRT takes the precision from the graph: export the ONNX in {precision} first."
        )
