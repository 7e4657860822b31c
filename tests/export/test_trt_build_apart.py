"""Engines of files of others are built in a process of their own, whose end is an error of this one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from passdeploy.errors import CorruptArtifact, ExportError, MissingExtra, PassDeployError, UsageError
from passdeploy.export import Artifact, EngineOptions, trt_build_apart
from passdeploy.export.artifact import describe_artifact
from passdeploy.export.trt_build_apart import build_engine_apart
from passdeploy.runtime.child_process import AnsweringChild
from passdeploy.runtime.events import Event, Listener, Warned


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    (tmp_path / "m.onnx").write_bytes(b"")
    return tmp_path / "m.onnx"


def build(graph: Path, events: list[Event] | None = None) -> object:
    return build_engine_apart(
        graph,
        graph.with_suffix(".engine"),
        flavour="tensorrt",
        batch=(1, 2, 4),
        precision="fp32",
        options=EngineOptions(),
        listener=(events if events is not None else []).append,
    )


def in_place_of_the_child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    program = f"import json, os, signal, time; engine = json.loads(input())['engine']; {code}"

    def start() -> AnsweringChild:
        pipe = subprocess.PIPE
        return AnsweringChild(subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe))

    monkeypatch.setattr(trt_build_apart, "_start", start)


def test_a_crash_of_the_builder_is_an_error_and_leaves_nothing_behind(graph: Path, monkeypatch: pytest.MonkeyPatch):
    draft = "open(engine.replace('m.engine', f'.m.{os.getpid()}.engine'), 'w').write('half')"
    in_place_of_the_child(monkeypatch, f"{draft}; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(CorruptArtifact, match=r"m\.onnx crashes TensorRT while an engine is built .*\(SIGSEGV\)"):
        build(graph)
    assert list(graph.parent.iterdir()) == [graph]


def test_a_build_without_end_is_ended(graph: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trt_build_apart, "_LIMIT_S", 0.1)
    in_place_of_the_child(monkeypatch, "time.sleep(60)")
    with pytest.raises(CorruptArtifact, match="keeps TensorRT busy"):
        build(graph)


class HereAndNow:
    """A child that is none: it answers in this process, through JSON as the other does."""

    pid = 0

    def ask(self, request: dict[str, Any], *, limit_s: float) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(json.dumps(trt_build_apart._answer(json.loads(json.dumps(request)))))
        return answer

    def close(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (UsageError("no such batch"), UsageError, "no such batch"),
        (MissingExtra("tensorrt", "trt"), MissingExtra, r"passdeploy\[trt\]"),
        (RuntimeError("bindings\nof TensorRT"), ExportError, "m.onnx cannot be built: RuntimeError: bindings$"),
    ],
)
def test_errors_and_warnings_come_back(
    error: Exception, kind: type[Exception], words: str, graph: Path, monkeypatch: pytest.MonkeyPatch
):
    def failing(*_: object, listener: Listener, **__: object) -> None:
        listener(Warned("careful"))
        raise error

    monkeypatch.setattr(trt_build_apart, "_start", HereAndNow)
    monkeypatch.setattr(trt_build_apart, "build_engine", failing)
    events: list[Event] = []
    with pytest.raises(PassDeployError, match=words) as caught:
        build(graph, events)
    assert type(caught.value) is kind
    assert events == [Warned("careful")]


def test_an_engine_comes_back_as_it_was_described(graph: Path, monkeypatch: pytest.MonkeyPatch):
    def built(onnx: Path, engine: str, **asked: object) -> Artifact:
        Path(engine).write_bytes(b"native code")
        return describe_artifact(Path(engine), kind="engine", precision="fp32", facts={"batch": asked["batch"]})

    monkeypatch.setattr(trt_build_apart, "_start", HereAndNow)
    monkeypatch.setattr(trt_build_apart, "build_engine", built)
    assert build(graph) == built(graph, str(graph.with_suffix(".engine")), batch=[1, 2, 4])
