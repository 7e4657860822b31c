"""Tests of the layer-precision counts, from the engine inspector's JSON of TensorRT 10 and 11."""

from __future__ import annotations

import json

import pytest

from passdeploy.errors import ExportError
from passdeploy.export.trt_layer_precisions import count_engine_layers, require_precision


def test_both_dialects_of_the_inspector_are_counted_alike():
    ten = {"Name": "x", "LayerType": "CaskConvolution", "Outputs": [{"Format/Datatype": "Channel major FP16 format"}]}
    eleven = {"Name": "x", "LayerType": "CaskConvolution", "Outputs": [{"Format": "Channel major", "Datatype": "Half"}]}
    reformat = {"Name": "y", "LayerType": "Reformat", "Outputs": [{"Format/Datatype": "Row major linear FP32"}]}
    expected = {"layers": {"fp16": 1, "fp32": 1}, "convolutions": {"fp16": 1}}
    for dialect in (ten, eleven):
        assert count_engine_layers(json.dumps({"Layers": [dialect, reformat], "Bindings": ["images"]})) == expected


def test_a_convolution_of_int8_that_puts_out_floats_is_one_of_int8():
    layer = {
        "LayerType": "CaskConvolution",
        "Inputs": [{"Datatype": "Int8"}],
        "Outputs": [{"Datatype": "Float"}],
    }
    assert count_engine_layers(json.dumps({"Layers": [layer]}))["convolutions"] == {"int8": 1}


def test_a_network_without_convolutions_is_judged_by_its_layers():
    counts = {"convolutions": {}, "layers": {"fp32": 7}}
    require_precision(counts, "fp32")
    with pytest.raises(ExportError, match="asked fp16, found 0 of 7 layers"):
        require_precision(counts, "fp16")
