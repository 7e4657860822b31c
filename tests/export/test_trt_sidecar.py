"""Tests that only engines with a matching sidecar are loaded, with a stand-in for TensorRT."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from passdeploy.errors import CorruptArtifact, ExportError, MissingError, RunError, UsageError
from passdeploy.export import load_engine, trt_sidecar
from passdeploy.export.artifact import describe_artifact
from passdeploy.export.trt_sidecar import sidecar_path, write_sidecar
from passdeploy.runtime.events import Event, Warned


class Runtime:
    """A stand-in for TensorRT's runtime that loads every plan but an empty one."""

    made: Any = None

    def __init__(self, logger: object) -> None:
        self.engine_host_code_allowed = False
        self.logger: Any = logger
        Runtime.made = self

    def deserialize_cuda_engine(self, plan: bytes) -> object:
        if plan:
            return SimpleNamespace(plan=plan, refittable=plan.startswith(b"refittable"))
        self.logger.log(SimpleNamespace(name="ERROR"), "IRuntime: Serialized engine is empty")
        return None


class Logger:
    """A stand-in for the base class of loggers."""


FAKE = SimpleNamespace(__version__="11.4.0.106", Runtime=Runtime, ILogger=Logger)


@pytest.fixture(autouse=True)
def a_machine_with_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_sidecar, "require_gpu", lambda purpose, hint: None)
    monkeypatch.setattr(trt_sidecar, "load_trt", lambda flavour: FAKE)


def engine(folder: Path, content: bytes = b"native code", **facts: Any) -> Path:
    path = folder / "model.engine"
    path.write_bytes(content)
    facts = {"flavour": "tensorrt", "tensorrt": "11.4.0.106", "options": {"version_compatible": False}, **facts}
    write_sidecar(describe_artifact(path, kind="engine", precision="fp16", facts=facts))
    return path


def test_an_engine_that_its_sidecar_knows_is_loaded(tmp_path: Path):
    trt, loaded = load_engine(engine(tmp_path))
    assert trt is FAKE
    assert loaded.plan == b"native code"  # type: ignore[attr-defined]
    assert not Runtime.made.engine_host_code_allowed


@pytest.mark.parametrize("damage", ["other bytes", "no sidecar", "not a sidecar"])
def test_an_engine_without_a_matching_sidecar_needs_trust_engine(damage: str, tmp_path: Path):
    path = engine(tmp_path)
    if damage == "other bytes":
        path.write_bytes(b"other code")
    elif damage == "no sidecar":
        sidecar_path(path).unlink()
    else:
        sidecar_path(path).write_text("[]")
    Runtime.made = None
    with pytest.raises(CorruptArtifact, match="--trust-engine"):
        load_engine(path)
    assert Runtime.made is None  # TensorRT never saw it
    assert load_engine(path, trust_engine=True)[1] is not None
    assert Runtime.made.engine_host_code_allowed  # nobody knows whether it has any


@pytest.mark.parametrize(("name", "flavour"), [("model.engine", "tensorrt"), ("model-fp16-rtx.engine", "rtx")])
def test_without_a_sidecar_the_name_says_which_tensorrt_it_is_for(
    name: str, flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    monkeypatch.setattr(trt_sidecar, "load_trt", lambda flavour: asked.append(flavour) or FAKE)
    (tmp_path / name).write_bytes(b"native code")
    load_engine(tmp_path / name, trust_engine=True)
    assert asked == [flavour]


def test_without_a_sidecar_nobody_knows_the_weights_of_an_engine_that_can_be_refitted(tmp_path: Path):
    heard: list[Event] = []
    path = engine(tmp_path, content=b"refittable code")
    load_engine(path, listener=heard.append)
    assert heard == []
    sidecar_path(path).unlink()
    load_engine(path, trust_engine=True, listener=heard.append)
    (event,) = heard
    assert isinstance(event, Warned)
    assert "whether it holds its weights is not known" in event.text


def test_the_sidecar_is_checked_before_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_driver(purpose: str, hint: str) -> None:
        raise MissingError("there is no NVIDIA driver here")

    monkeypatch.setattr(trt_sidecar, "require_gpu", no_driver)
    path = engine(tmp_path)
    with pytest.raises(MissingError, match="no NVIDIA driver"):
        load_engine(path)
    path.write_bytes(b"other code")
    with pytest.raises(CorruptArtifact):
        load_engine(path)


def test_another_tensorrt_names_both_versions(tmp_path: Path):
    with pytest.raises(MissingError, match=r"built with TensorRT 10\.16\.1\.11, here is 11\.4\.0\.106"):
        load_engine(engine(tmp_path, tensorrt="10.16.1.11"))


def test_a_version_compatible_engine_runs_its_own_code_only_when_trusted(tmp_path: Path):
    path = engine(tmp_path, tensorrt="10.16.1.11", options={"version_compatible": True})
    with pytest.raises(UsageError, match="code of its own"):
        load_engine(path)
    load_engine(path, trust_engine=True)
    assert Runtime.made.engine_host_code_allowed


def test_an_engine_that_does_not_load_says_why(tmp_path: Path):
    with pytest.raises(ExportError, match="Serialized engine is empty"):
        load_engine(engine(tmp_path, content=b""))


def test_a_missing_engine_names_the_command(tmp_path: Path):
    with pytest.raises(RunError, match="passdeploy export --trt"):
        load_engine(tmp_path / "model.engine", trust_engine=True)


def test_the_sidecar_holds_what_was_found(tmp_path: Path):
    facts = json.loads(sidecar_path(engine(tmp_path)).read_text())
    assert (facts["file"], facts["precision"], facts["size_bytes"]) == ("model.engine", "fp16", 11)
