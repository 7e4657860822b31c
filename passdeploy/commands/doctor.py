"""What this machine can do, and what is missing for the rest; reads, installs nothing, changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from passdeploy.errors import PassDeployError, require
from passdeploy.runtime.versions import package_versions


def examine() -> dict[str, Any]:
    """Versions, for every command whether it would find what it needs (`can`: name -> ok, why), and release families.

    `torch_tensorrt` lists the releases of torch, Torch-TensorRT and TensorRT that were made for each other.
    """
    from passdeploy.export.torch_trt import VERSION_MATRIX

    return {
        "versions": package_versions(),
        "can": {name: _try(attempt) for name, attempt in _ATTEMPTS.items()},
        "torch_tensorrt": list(VERSION_MATRIX),
    }


def _try(attempt: Callable[[], object]) -> dict[str, Any]:
    try:
        attempt()
    except PassDeployError as error:
        return {"ok": False, "why": str(error).replace("\n", " ")}
    return {"ok": True, "why": ""}


def _gpu() -> None:
    from passdeploy.runtime.devices import find_device

    find_device("cuda")


def _tensorrt() -> None:
    from passdeploy.export import load_trt

    load_trt("tensorrt")


def _rtx() -> None:
    from passdeploy.export import load_trt

    load_trt("rtx")


def _torch_trt() -> None:
    from passdeploy.export.torch_trt import load_torch_trt

    load_torch_trt()


_ATTEMPTS: dict[str, Callable[[], object]] = {
    "train on a GPU": _gpu,
    "check and profile ONNX": lambda: require("onnxruntime", extra="cpu"),
    "export --trt": _tensorrt,
    "export --trt --flavour rtx": _rtx,
    "export --torch-trt": _torch_trt,
    "export --precision int8": lambda: require("onnxruntime.quantization", extra="cpu"),
    "export --precision fp8": lambda: require("modelopt.onnx.quantization", extra="quant"),
    "models timm/NAME": lambda: require("timm", extra="timm"),
    "data: digits": lambda: require("sklearn", extra="demo"),
}
