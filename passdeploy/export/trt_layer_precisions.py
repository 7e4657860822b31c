"""In which precision the layers of an engine really run: counted, since asking for it is no proof."""

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


def count_layer_precisions(
    trt: TensorRT,
    logger: tensorrt.ILogger,
    plan: tensorrt.IHostMemory,
    network: tensorrt.INetworkDefinition,
    driver: Driver | None,
) -> dict[str, Any]:
    """How many layers run in which data type: from the engine where it loads here, else from the network.

    The network of a strongly typed build fixes every type, but only the engine proves it; the
    key "source" says which of the two was counted.
    """
    if driver is not None and driver.devices:
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        if engine is not None:
            text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
            return {"source": "engine", **count_engine_layers(text)}
    return {"source": "network", **_count_network_layers(network)}


def _count_network_layers(network: tensorrt.INetworkDefinition) -> dict[str, Any]:
    """Layers per kind and data type. A convolution between dequantised tensors counts as what they were before."""
    layers: Counter[tuple[str, str]] = Counter()
    quantised: dict[str, str] = {}  # tensor that comes out of a dequantisation -> its type before
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
    """Layers per kind and data type from the inspector's JSON, in TensorRT 10's dialect and in 11's.

    TensorRT 10 names a tensor's type inside its "Format/Datatype", 11 in a field "Datatype" of its own.

    >>> report = '{"Layers": [{"LayerType": "CaskConvolution", "Outputs": [{"Datatype": "Half"}]}]}'
    >>> count_engine_layers(report)["convolutions"]
    {'fp16': 1}
    """
    layers: Counter[tuple[str, str]] = Counter()
    for layer in json.loads(inspector_json).get("Layers", []):
        if not isinstance(layer, dict) or not layer.get("Outputs"):
            continue
        kind = "CONVOLUTION" if "conv" in str(layer.get("LayerType", "")).lower() else str(layer.get("LayerType"))
        # A convolution of int8 may put out floats: what goes in tells what it computes with.
        tensor = (layer.get("Inputs") or layer["Outputs"])[0] if kind == "CONVOLUTION" else layer["Outputs"][0]
        layers[kind, _parse_data_type(str(tensor.get("Datatype") or tensor.get("Format/Datatype") or ""))] += 1
    return _tabulate(layers)


def _parse_data_type(text: str) -> str:
    """The data type that an inspector's words name, as `DataType` spells it."""
    words = {
        "float": "FLOAT",
        "fp32": "FLOAT",
        "half": "HALF",
        "fp16": "HALF",
        "bf16": "BF16",
        "bfloat16": "BF16",
    }
    words |= {"int8": "INT8", "fp8": "FP8"}
    return next((words[word] for word in text.lower().replace("-", " ").split() if word in words), text)


def _tabulate(layers: Counter[tuple[str, str]]) -> dict[str, Any]:
    """Counts by data type: of all layers, and of the convolutions alone."""
    everything: Counter[str] = Counter()
    convolutions: Counter[str] = Counter()
    for (kind, data_type), count in layers.items():
        name = _DATA_TYPES.get(data_type, data_type.lower())
        everything[name] += count
        if kind in _CONVOLUTIONS:
            convolutions[name] += count
    return {"layers": dict(sorted(everything.items())), "convolutions": dict(sorted(convolutions.items()))}


def require_precision(layer_precisions: Mapping[str, Any], precision: str) -> None:
    """At least one convolution runs in the precision asked for; without convolutions, at least one layer."""
    what = "convolutions" if layer_precisions["convolutions"] else "layers"
    counts: Mapping[str, int] = layer_precisions[what]
    if precision not in counts:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ExportError(
            f"asked {precision}, found 0 of {sum(counts.values())} {what} in it ({found}).\n"
            f"TensorRT takes the precision from the graph: export the ONNX in {precision} first."
        )
