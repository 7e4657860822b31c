"""Fixtures of the export tests: a small network, images, and its ONNX file."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache
from importlib import import_module

import pytest
import torch
from torch import Tensor

from passdeploy.export import Artifact, export_onnx

from .nets import SmallNet, small_net


@pytest.fixture(scope="session", autouse=True)
def _operators_are_read_once() -> Iterator[None]:
    """Cache the operator table of torch's exporter, which otherwise parses 500 translations in each export (0.3 s).

    With a version of torch that is built differently, the cache is left out and nothing else changes.
    """
    apis = getattr(import_module("torch.onnx._internal.exporter._registration"), "onnxscript_apis", None)
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(apis, "get_torchlib_ops"):
            patch.setattr(apis, "get_torchlib_ops", cache(apis.get_torchlib_ops))
        gc.freeze()  # imported modules are never garbage, and scanning them takes a sixth of an export
        yield
        gc.unfreeze()


@pytest.fixture(scope="session")
def net() -> SmallNet:
    return small_net()


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def exported(net: SmallNet, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Export the small network once, since that takes a second; tests that change the file copy it."""
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    return export_onnx(net, images, path, metadata={"classes": ["a", "b"], "run": "tiny-0001"})
