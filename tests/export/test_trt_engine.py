"""The real builder of TensorRT for RTX where it is installed; TensorRT itself by its absence and by a fake."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from passdeploy.errors import CorruptArtifact, ExportError, MissingError, PassDeployError, RunError, UsageError
from passdeploy.export import Artifact, build_engine, driver, load_trt, trt_engine
from passdeploy.export.driver import Driver
from passdeploy.export.trt_engine import BuilderLog, count_engine_layers
from passdeploy.files import sha256_of

from .nets import node, write_graph

needs_builder = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None, reason="the builder of TensorRT for RTX is not installed (extra rtx)"
)
GPU = Driver((13, 2), ("Imaginary GPU",))


@needs_builder
@pytest.mark.rtx
class TestWithTheRealBuilder:
    def test_an_engine_comes_with_a_sidecar_that_knows_it(self, exported: Artifact, tmp_path: Path):
        engine = build_engine(exported.path, tmp_path / "model-rtx.engine", flavour="rtx", batch=(1, 2, 4))
        sidecar = json.loads((tmp_path / "model-rtx.engine.json").read_text())
        assert sidecar["sha256"] == engine.sha256 == sha256_of(engine.path)
        assert sidecar["onnx_sha256"] == exported.sha256
        assert sidecar["batch"] == [1, 2, 4]
        assert sidecar["census"]["convolutions"] == {"fp32": 4}
        assert sorted(file.name for file in tmp_path.iterdir()) == ["model-rtx.engine", "model-rtx.engine.json"]

    def test_without_a_gpu_the_census_says_that_it_counts_the_network(
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


def imported_as(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Let TensorRT be `module`; an exception is what importing it raises."""

    def importing(name: str) -> Any:
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr(trt_engine, "import_module", importing)


def refusal(flavour: Any = "tensorrt") -> str:
    with pytest.raises(MissingError) as caught:
        load_trt(flavour)
    assert caught.value.exit_code == 3
    assert str(caught.value).count("\n") < 3
    return str(caught.value)


class TestWhatIsMissing:
    @pytest.fixture(autouse=True)
    def a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(driver, "probe_driver", lambda: GPU)

    def test_no_driver_is_found_before_tensorrt_is_touched(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(driver, "probe_driver", lambda: None)
        imported_as(monkeypatch, AssertionError("TensorRT was imported"))
        assert "--flavour rtx" in refusal()

    def test_a_driver_without_a_visible_gpu(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(driver, "probe_driver", lambda: Driver((13, 0), ()))
        assert "CUDA_VISIBLE_DEVICES" in refusal()

    def test_a_driver_that_is_too_old(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(driver, "probe_driver", lambda: Driver((12, 8), ("Imaginary GPU",)))
        imported_as(monkeypatch, SimpleNamespace(__version__="11.4.0.106"))
        assert "runs CUDA up to 12.8; TensorRT 11.4.0.106 needs 13" in refusal()

    @pytest.mark.parametrize(("flavour", "extra"), [("tensorrt", "passdeploy[trt]"), ("rtx", "passdeploy[rtx]")])
    def test_not_installed_names_the_extra(self, flavour: str, extra: str, monkeypatch: pytest.MonkeyPatch):
        name = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx_bindings"}[flavour]
        imported_as(monkeypatch, ModuleNotFoundError(f"No module named {name!r}", name=name))
        assert extra in refusal(flavour)

    def test_bindings_without_their_libraries(self, monkeypatch: pytest.MonkeyPatch):
        text = "libnvinfer.so.11: cannot open shared object file: No such file or directory"
        imported_as(monkeypatch, ImportError(text))
        assert "libnvinfer.so.11" in refusal()

    @pytest.mark.parametrize("version", ["10.12.0.36", "12.0.0.1"])
    def test_a_release_that_is_not_supported(self, version: str, monkeypatch: pytest.MonkeyPatch):
        imported_as(monkeypatch, SimpleNamespace(__version__=version))
        assert f"found TensorRT {version}, supported is >=10.13,<12" in refusal()

    def test_a_supported_release_is_handed_out(self, monkeypatch: pytest.MonkeyPatch):
        module = SimpleNamespace(__version__="10.16.1.11")
        imported_as(monkeypatch, module)
        assert load_trt("tensorrt") is module


def test_an_unknown_flavour_lists_the_known_ones():
    with pytest.raises(UsageError, match="there are tensorrt and rtx"):
        load_trt("vanilla")  # type: ignore[arg-type]


def test_a_missing_onnx_file_names_the_command(tmp_path: Path):
    with pytest.raises(RunError, match="passdeploy export --onnx"):
        build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", flavour="rtx")


def test_an_object_that_cannot_be_made_shows_the_last_error_logged():
    log = BuilderLog()

    def null_factory() -> Any:
        log.add(
            "ERROR", "CUDA initialization failure with error: 35 (cudaError 35: CUDA driver version is insufficient)"
        )
        log.add("INFO", "shutting down")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(MissingError, match=r"CUDA initialization failure(.|\n)*update the driver"):
        trt_engine._create(null_factory, log)


def test_the_log_keeps_the_newest_lines():
    log = BuilderLog()
    for number in range(1000):
        log.add("ERROR", f"error {number}")
    assert log.last_error() == "error 999"
    assert len(log.lines) < 100


def test_both_dialects_of_the_inspector_are_counted_alike():
    ten = {"Name": "x", "LayerType": "CaskConvolution", "Outputs": [{"Format/Datatype": "Channel major FP16 format"}]}
    eleven = {"Name": "x", "LayerType": "CaskConvolution", "Outputs": [{"Format": "Channel major", "Datatype": "Half"}]}
    reformat = {"Name": "y", "LayerType": "Reformat", "Outputs": [{"Format/Datatype": "Row major linear FP32"}]}
    expected = {"layers": {"fp16": 1, "fp32": 1}, "convolutions": {"fp16": 1}}
    for dialect in (ten, eleven):
        assert count_engine_layers(json.dumps({"Layers": [dialect, reformat], "Bindings": ["images"]})) == expected


def test_the_driver_probe_answers_on_this_machine_without_raising():
    found = driver.probe_driver()
    assert found is None or found.cuda > (0, 0)


def test_every_error_of_the_engine_has_an_exit_code():
    assert issubclass(ExportError, PassDeployError)
    assert ExportError.exit_code == 4
