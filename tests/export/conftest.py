"""Fixtures of the export tests: a small network, images, and its ONNX file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from passdeploy.export import Artifact, export_onnx

from .nets import SmallNet, small_net


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
