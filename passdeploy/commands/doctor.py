"""Check of the GPUs, of the backends that start and of the commands that can run here; changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from passdeploy.errors import MissingError, MissingExtra, PassDeployError, require
from passdeploy.runtime.versions import package_versions


def examine() -> dict[str, Any]:
    """Collect package versions and GPUs, start every backend, and try, for every command, what it needs.

    Returns:
        `versions`: package -> version; `gpus`: name, memory, compute capability, driver, its newest CUDA and that of
        PyTorch, and why PyTorch cannot use a GPU (`why`); `starts`: backend -> `ok`, `why` not, `device` and `seconds`;
        `can`: command -> `ok` and `why` not; `torch_tensorrt`: the releases of torch, Torch-TensorRT and TensorRT that
        were made for each other; `torch_tensorrt_installed`: the title of the one that is installed, or none.
    """
    import torch

    from passdeploy.export.torch_trt_release import VERSION_MATRIX
    from passdeploy.profiling.backend_start import try_backends
    from passdeploy.profiling.nvml import read_gpus
    from passdeploy.runtime.devices import find_device, unused_gpu

    why = unused_gpu()
    gpus = [
        {"device": f"cuda:{index}", **gpu, "torch_cuda": torch.version.cuda, "why": why or ""}
        for index, gpu in enumerate(read_gpus())
    ]
    return {
        "versions": package_versions(),
        "gpus": gpus,
        "starts": try_backends(find_device()),
        "can": {name: _run_check(check) for name, check in _CHECKS.items()},
        "torch_tensorrt": list(VERSION_MATRIX),
        "torch_tensorrt_installed": _installed_torch_tensorrt(),
    }


def _installed_torch_tensorrt() -> str:
    """Name the Torch-TensorRT that is installed, with its release."""
    from passdeploy.export.torch_trt_release import PACKAGES, TITLES, installed_flavour

    try:
        flavour = installed_flavour()
    except MissingError as error:
        return " ".join(str(error).split())
    return "none" if flavour is None else f"{TITLES[flavour]} {package_versions()[PACKAGES[flavour]]}"


def _run_check(check: Callable[[], object]) -> dict[str, Any]:
    try:
        check()
    except PassDeployError as error:
        return {"ok": False, "why": str(error).replace("\n", " ")}
    return {"ok": True, "why": ""}


def _require_installed(module: str, *, extra: str) -> None:
    """Check that a package is there, without importing it, which would take seconds."""
    if find_spec(module) is None:
        raise MissingExtra(module, extra)


def _check_gpu() -> None:
    from passdeploy.runtime.devices import find_device

    find_device("cuda")


def _check_tensorrt() -> None:
    from passdeploy.export import load_trt

    load_trt("tensorrt")


def _check_rtx() -> None:
    from passdeploy.export import load_trt

    load_trt("rtx")


def _check_torch_trt() -> None:
    from passdeploy.export.torch_trt_release import load_torch_trt

    load_torch_trt("tensorrt")


def _check_torch_trt_rtx() -> None:
    from passdeploy.export.torch_trt_release import load_torch_trt

    load_torch_trt("rtx")


_CHECKS: dict[str, Callable[[], object]] = {
    "train on a GPU": _check_gpu,
    "check and profile ONNX": lambda: require("onnxruntime", extra="cpu"),
    "export --trt": _check_tensorrt,
    "export --trt --flavour rtx": _check_rtx,
    "export --torch-trt": _check_torch_trt,
    "export --torch-trt --flavour rtx": _check_torch_trt_rtx,
    "export --precision int8": lambda: require("onnxruntime.quantization", extra="cpu"),
    "export --precision fp8": lambda: require("modelopt.onnx.quantization", extra="quant"),
    "models timm/NAME": lambda: _require_installed("timm", extra="timm"),
    "data: digits": lambda: _require_installed("sklearn", extra="demo"),
}
