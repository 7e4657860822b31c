"""Versions of passdeploy and of the packages that its results depend on, read without importing them."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

__version__ = "0.1.0"

_RECORDED_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-cu12-bindings",
    "tensorrt-cu13-bindings",
    "tensorrt-cu12-libs",
    "tensorrt-cu13-libs",
    "tensorrt-rtx-cu13-bindings",
    "tensorrt-rtx-cu13-libs",
    "torch-tensorrt",
    "torch-tensorrt-rtx",
    "nvidia-modelopt",
)


@cache
def package_versions() -> dict[str, str]:
    """Look up the versions of the installed packages, by package name."""
    versions = {"passdeploy": __version__, "python": python_version()}
    for name in _RECORDED_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
