"""Tests of building engines with TensorRT for RTX, where it is installed."""

from __future__ import annotations

import gc
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from passdeploy.errors import CorruptArtifact, ExportError, PassDeployError, RunError
from passdeploy.export import Artifact, build_engine, trt_engine
from passdeploy.export.trt_log import BuilderLog
from passdeploy.runtime.events import Event, Warned
from passdeploy.runtime.files import sha256_of

from .nets import node, write_graph

needs_builder = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None, reason="the builder of TensorRT for RTX is not installed (extra rtx)"
)


@needs_builder
@pytest.mark.rtx
class TestWithTheRealBuilder:
    def test_an_engine_comes_with_a_sidecar_that_describes_it(self, exported: Artifact, tmp_path: Path):
        engine = build_engine(exported.path, tmp_path / "model-rtx.engine", flavour="rtx", batch=(1, 2, 4))
        sidecar = json.loads((tmp_path / "model-rtx.engine.json").read_text())
        assert sidecar["sha256"] == engine.sha256 == sha256_of(engine.path)
        assert sidecar["onnx_sha256"] == exported.sha256
        assert sidecar["batch"] == [1, 2, 4]
        assert sidecar["census"]["convolutions"] == {"fp32": 4}
        assert sorted(file.name for file in tmp_path.iterdir()) == ["model-rtx.engine", "model-rtx.engine.json"]

    def test_without_a_gpu_the_layers_of_the_network_are_counted(
        self, exported: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(trt_engine, "probe_driver", lambda: None)
        engine = build_engine(exported.path, tmp_path / "model.engine", flavour="rtx")
        assert engine.facts["census"]["source"] == "network"
        assert engine.facts["gpus"] == []

    @pytest.mark.parametrize(
        ("nodes", "weights", "words"),
        [
            (
                [node("Mystery", "images", domain="my.ops")],
                {},
                r"Mystery node(.|\n)*Plugin not found(.|\n)*no such operator",
            ),
            (
                [
                    node("QuantizeLinear", "images", "scale", "zero", output="quantised"),
                    node("DequantizeLinear", "quantised", "scale", "zero"),
                ],
                {"scale": np.float32(0.1), "zero": np.int8(3)},
                r"QuantizeLinear node(.|\n)*Non-zero zero point(.|\n)*symmetrically",
            ),
            (
                [
                    node("Cast", "images", output="integers", to=7),
                    node("ReduceMax", "integers", output="axes", keepdims=0),
                    node("ReduceMean", "images", "axes"),
                ],
                {},
                r"ReduceMean node(.|\n)*build-time constant(.|\n)*optimize=True",
            ),
            (
                [node("Add", "images", "four")],
                {"four": np.ones((4, 3, 8, 8), np.float32)},
                r"cannot build an engine(.|\n)*4 != 2",
            ),
        ],
        ids=["unknown operator", "zero point", "axes that are computed", "a batch the graph cannot take"],
    )
    def test_a_bad_graph_is_refused_in_the_builders_own_words(
        self, nodes: list[Any], weights: dict[str, Any], words: str, tmp_path: Path
    ):
        graph = write_graph(tmp_path / "bad.onnx", nodes, weights, domains=["my.ops"])
        with pytest.raises(ExportError, match=words) as caught:
            build_engine(graph, tmp_path / "bad.engine", flavour="rtx", batch=(1, 2, 8))
        assert str(caught.value).count("\n") < 3
        assert [file.name for file in tmp_path.iterdir()] == ["bad.onnx"]

    def test_no_garbage_is_collected_while_tensorrt_calls_us(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Test for a deadlock: TensorRT holds a lock while it logs, and destroying a builder waits for that lock."""
        collects: list[bool] = []
        monkeypatch.setattr(BuilderLog, "add", lambda *_: collects.append(gc.isenabled()))
        graph = write_graph(tmp_path / "relu.onnx", [node("Relu", "images")])
        build_engine(graph, tmp_path / "relu.engine", flavour="rtx", batch=(1, 2, 8))
        assert collects
        assert not any(collects)
        assert gc.isenabled()

    def test_an_open_image_size_is_named(self, tmp_path: Path):
        graph = write_graph(tmp_path / "open.onnx", [node("Relu", "images")], shape=("batch", 3, "h", "w"))
        with pytest.raises(ExportError, match=r"'images' has open dimensions \[2, 3\]"):
            build_engine(graph, tmp_path / "open.engine", flavour="rtx")

    def test_a_fixed_batch_builds_for_that_batch_alone(self, tmp_path: Path):
        graph = write_graph(tmp_path / "fixed.onnx", [node("Relu", "images")], shape=(4, 3, 8, 8))
        with pytest.raises(ExportError, match="fixed batch of 4; asked was --batch 1,8,32"):
            build_engine(graph, tmp_path / "fixed.engine", flavour="rtx")
        assert build_engine(graph, tmp_path / "fixed.engine", flavour="rtx", batch=(4, 4, 4)).size_bytes > 0

    def test_a_precision_that_is_not_in_the_graph_is_an_error(self, exported: Artifact, tmp_path: Path):
        with pytest.raises(ExportError, match="asked fp16, found 0 of 4 convolutions"):
            build_engine(exported.path, tmp_path / "model.engine", flavour="rtx", precision="fp16")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("content", [b"something else", b""])
    def test_a_file_without_a_network_is_corrupt(self, content: bytes, tmp_path: Path):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(CorruptArtifact, match=r"model\.onnx"):
            build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", flavour="rtx")


def test_a_missing_onnx_file_names_the_command(tmp_path: Path):
    with pytest.raises(RunError, match="passdeploy export --onnx"):
        build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", flavour="rtx")


def test_every_error_of_the_engine_has_an_exit_code():
    assert issubclass(ExportError, PassDeployError)
    assert ExportError.exit_code == 4


@pytest.mark.parametrize(
    "refusal", [{"set_timing_cache.return_value": False}, {"create_timing_cache.return_value": None}]
)
def test_a_timing_cache_that_tensorrt_refuses_is_said_and_stays(refusal: dict[str, Any], tmp_path: Path):
    path, events = tmp_path / "timing.cache", list[Event]()
    path.write_bytes(b"of another GPU")
    with trt_engine._timing_cache(Mock(**refusal), path, events.append) as used:
        assert used is None
    (event,) = events
    assert isinstance(event, Warned)
    assert "timing.cache is not used" in event.text
    assert path.read_bytes() == b"of another GPU"


def test_a_timing_cache_that_cannot_be_written_costs_no_engine(tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    calls, events = Mock(), list[Event]()
    with trt_engine._timing_cache(calls, tmp_path / "file" / "timing.cache", events.append):
        calls.get_timing_cache.return_value.serialize.return_value = b"timings"
    (event,) = events
    assert isinstance(event, Warned)
    assert "timing.cache cannot be written (File exists)" in event.text
    with trt_engine._timing_cache(calls, tmp_path / "timing.cache", events.append):
        pass
    assert (tmp_path / "timing.cache").read_bytes() == b"timings"
