"""Names of backends and precisions; plain words, so that the command line knows them without torch."""

from __future__ import annotations

ON_GPU = ("ort-cuda", "ort-trt", "tensorrt", "torch-trt")  # backends that run on a GPU only
BACKENDS = ("torch", "compile", "ort", *ON_GPU)
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")  # of exported files
