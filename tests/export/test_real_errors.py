"""Tests of error messages with the real libraries on a machine without a GPU.

The tests of each error that a user can meet (real: with the library's own message; otherwise with a stand-in):

    TensorRT not installed                 here (real), test_trt_api
    bindings without their libraries       here (real, RTX), test_trt_api
    a release that is not supported        test_trt_api; a plan of another release: test_trt_sidecar
    no driver, before anything is touched  here (real), test_trt_api, test_commands
    a driver that is too old               here (real: cudaError 35), test_trt_api, test_trt_log
    a driver without a visible GPU         test_trt_api
    a builder that cannot be made          test_trt_log
    a graph that is not parsed             test_trt_engine (real: unknown operator, zero point, computed axes, not ONNX)
    open dimensions, a fixed batch         test_trt_engine, test_lint
    a build that gives nothing             test_trt_engine (real: a batch the graph cannot take)
    a plan that does not load              here (real), test_trt_sidecar
    a precision that was not applied       test_trt_engine (real), test_trt_layer_precisions, test_exporter
    Torch-TensorRT does not import         here (real: not installed), test_torch_trt
    ONNX Runtime takes the CPU instead     here (real: not built in), profiling/test_runners
    a plan without a matching sidecar      test_trt_sidecar, test_commands
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from passdeploy.errors import ExportError, MissingError
from passdeploy.export import Artifact, build_engine, load_engine, load_trt, trt_sidecar
from passdeploy.export.ort_session import open_session
from passdeploy.export.torch_trt_release import load_torch_trt
from passdeploy.runtime.cuda_driver import Driver, probe_driver

from .nets import node, write_graph

needs_builder = pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="extra rtx is not installed")
without_driver = pytest.mark.skipif(probe_driver() is not None, reason="there is an NVIDIA driver")
GPU = Driver((13, 2), ("Imaginary GPU",))

WITHOUT_LIBRARIES = """
import sys
sys.modules["tensorrt_rtx_libs"] = None  # the package with the libraries
from passdeploy.errors import MissingError
from passdeploy.export.trt_api import load_trt
try:
    load_trt("rtx")
except MissingError as error:
    print(error)
"""


@without_driver
@pytest.mark.parametrize("load", [lambda: load_trt("tensorrt"), load_torch_trt], ids=["TensorRT", "Torch-TensorRT"])
def test_no_driver(load):
    with pytest.raises(MissingError, match="there is no NVIDIA driver here"):
        load()


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_tensorrt_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("passdeploy.export.trt_api.require_gpu", lambda purpose, hint: GPU)
    with pytest.raises(MissingError, match=r"TensorRT is not installed(.|\n)*passdeploy\[trt10\]"):
        load_trt("tensorrt")


@pytest.mark.skipif(find_spec("torch_tensorrt") is not None, reason="Torch-TensorRT is installed")
def test_torch_tensorrt_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("passdeploy.export.torch_trt_release.require_gpu", lambda purpose, hint: GPU)
    with pytest.raises(MissingError, match=r"Torch-TensorRT is not installed(.|\n)*passdeploy\[torch-trt\]"):
        load_torch_trt()


@pytest.mark.rtx
@needs_builder
@pytest.mark.skipif(sys.platform != "linux", reason="the message is that of Linux")
def test_bindings_without_their_libraries():
    process = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARIES], capture_output=True, text=True, check=True)
    first, *advice = process.stdout.splitlines()
    assert first.startswith("the libraries of TensorRT for RTX 1.")
    assert "libtensorrt_rtx.so.1: cannot open shared object file" in first
    assert "passdeploy[rtx]" in advice[-1]
    assert len(advice) == 2


@pytest.mark.rtx
@needs_builder
@without_driver
def test_a_plan_that_does_not_load_shows_what_tensorrt_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    graph = write_graph(tmp_path / "model.onnx", [node("Relu", "images")])
    engine = build_engine(graph, tmp_path / "model.engine", flavour="rtx", batch=(1, 2, 4))
    with pytest.raises(MissingError, match="no NVIDIA driver"):
        load_engine(engine.path)
    monkeypatch.setattr(trt_sidecar, "require_gpu", lambda purpose, hint: GPU)
    with pytest.raises(ExportError, match=r"cannot load model\.engine(.|\n)*cudaError 35(.|\n)*update the driver"):
        load_engine(engine.path)


def test_onnx_runtime_without_the_provider_that_was_asked_for(exported: Artifact):
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("ONNX Runtime has CUDA here")
    with pytest.raises(MissingError, match=r"has no CUDAExecutionProvider here(.|\n)*passdeploy\[gpu\]"):
        open_session(exported.path, threads=1, provider="CUDAExecutionProvider")
