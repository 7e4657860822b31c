"""Tests of the Triton model repository: its files, and its configuration as Triton's own protobuf reads it."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from passdeploy.export import Artifact, BatchRange
from passdeploy.export.artifact import describe_artifact
from passdeploy.export.triton import config_text, write_repository
from passdeploy.runtime.events import Event, Warned

from .nets import node, write_graph


@pytest.fixture(scope="session")
def model_config() -> ModuleType:
    """Load `model_config_pb2` of tritonclient without its package, which imports gRPC."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("tritonclient is not installed (extra dev)")
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was generated for an older protobuf than this one
        spec.loader.exec_module(module)
    return module


def parsed(text: str, model_config: ModuleType) -> Any:
    from google.protobuf import text_format

    return text_format.Parse(text, model_config.ModelConfig())


def test_an_onnx_file_is_served_as_it_is(exported: Artifact, tmp_path: Path, model_config: ModuleType):
    written = write_repository(tmp_path, [exported], name="tiny")
    assert [str(artifact.path.relative_to(tmp_path)) for artifact in written] == [
        "tiny/1/model.onnx",
        "tiny/labels.txt",
        "tiny/config.pbtxt",
    ]
    assert (tmp_path / "tiny/1/model.onnx").read_bytes() == exported.path.read_bytes()
    assert (tmp_path / "tiny/labels.txt").read_text() == "a\nb\n"
    config = parsed((tmp_path / "tiny/config.pbtxt").read_text(), model_config)
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 32)
    assert [(one.name, list(one.dims)) for one in (*config.input, *config.output)] == [
        ("images", [3, 16, 16]),
        ("logits", [5]),
    ]
    assert config.input[0].data_type == config.output[0].data_type == model_config.DataType.Value("TYPE_FP32")
    assert config.output[0].label_filename == "labels.txt"
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 32]


def test_a_plan_is_served_in_the_place_of_its_onnx_file(exported: Artifact, tmp_path: Path, model_config: ModuleType):
    path = tmp_path / "model.engine"
    path.write_bytes(b"a plan")
    facts = {"flavour": "tensorrt", "onnx": exported.path.name}
    plan = describe_artifact(path, kind="engine", precision="fp32", facts=facts)
    write_repository(tmp_path / "triton", [exported, plan], name="tiny")
    assert (tmp_path / "triton/tiny/1/model.plan").read_bytes() == b"a plan"
    config = parsed((tmp_path / "triton/tiny/config.pbtxt").read_text(), model_config)
    assert (config.platform, config.instance_group[0].kind) == ("tensorrt_plan", 1)  # KIND_GPU

    for_rtx = replace(plan, facts={**plan.facts, "flavour": "rtx"})  # Triton cannot serve it
    write_repository(tmp_path / "other", [exported, for_rtx], name="tiny")
    assert (tmp_path / "other/tiny/1/model.onnx").is_file()


def test_an_engine_without_weights_is_not_served(exported: Artifact, tmp_path: Path):
    path = tmp_path / "model.engine"
    path.write_bytes(b"a plan without weights")
    facts = {"flavour": "tensorrt", "onnx": exported.path.name, "options": {"weight_stripped": True}}
    plan = describe_artifact(path, kind="engine", precision="fp32", facts=facts)
    heard: list[Event] = []
    write_repository(tmp_path / "triton", [exported, plan], name="tiny", listener=heard.append)
    assert [file.name for file in (tmp_path / "triton/tiny/1").iterdir()] == ["model.onnx"]
    assert 'backend: "onnxruntime"' in (tmp_path / "triton/tiny/config.pbtxt").read_text()
    (event,) = heard
    assert isinstance(event, Warned)
    assert event.text.startswith("model.engine has no weights")


@pytest.mark.parametrize(("batch", "shape"), [((4, 4, 4), (4, 3, 8, 8)), ((2, 4, 8), ("batch", 3, 8, 8))])
def test_a_model_that_does_not_take_every_batch_gets_none_formed(
    batch: tuple[int, int, int], shape: tuple[int | str, ...], tmp_path: Path, model_config: ModuleType
):
    graph = onnx.load(write_graph(tmp_path / "m.onnx", [node("Relu", "images")], shape=shape)).graph
    text = config_text('odd name "q"', graph.input[0], graph.output[0], BatchRange.of(batch), False, False)
    config = parsed(text, model_config)
    assert (config.name, config.max_batch_size) == ('odd name "q"', 0)
    assert list(config.input[0].dims) == [shape[0] if isinstance(shape[0], int) else -1, 3, 8, 8]
    assert not config.HasField("dynamic_batching")


def test_a_name_for_each_network_and_precision(exported: Artifact, tmp_path: Path):
    for name in ("model-fp16.onnx", "dense.onnx"):
        (tmp_path / name).write_bytes(exported.path.read_bytes())
    others = [replace(exported, path=tmp_path / name) for name in ("model-fp16.onnx", "dense.onnx")]
    write_repository(tmp_path / "triton", [exported, *others], name="tiny")
    assert sorted(path.name for path in (tmp_path / "triton").iterdir()) == ["tiny", "tiny-dense", "tiny-fp16"]
