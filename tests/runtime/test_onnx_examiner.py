"""ONNX files of others are opened in a process of their own, whose end is an error of this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import helper

from passdeploy.errors import CorruptArtifact
from passdeploy.runtime import onnx_examiner
from passdeploy.runtime.child_process import AnsweringChild
from passdeploy.runtime.onnx_examiner import OnnxExaminer


def in_place_of_the_child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    def start(*_: object) -> AnsweringChild:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return AnsweringChild(process)

    monkeypatch.setattr(onnx_examiner, "_start", start)


def test_a_crash_is_an_error_that_names_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    in_place_of_the_child(monkeypatch, "import os, signal; input(); os.kill(os.getpid(), signal.SIGSEGV)")
    (tmp_path / "m.onnx").write_bytes(b"")
    with OnnxExaminer() as examiner, pytest.raises(CorruptArtifact, match=r"m\.onnx crashes .* \(SIGSEGV\)"):
        examiner.open(tmp_path / "m.onnx")


def test_a_file_that_keeps_the_child_busy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    in_place_of_the_child(monkeypatch, "import time; time.sleep(60)")
    (tmp_path / "m.onnx").write_bytes(b"")
    with OnnxExaminer(limit_s=0.2) as examiner, pytest.raises(CorruptArtifact, match="not opened within 0 s"):
        examiner.open(tmp_path / "m.onnx")


def test_what_a_gpu_provider_refuses_is_left_to_the_caller(tmp_path: Path):
    (tmp_path / "m.onnx").write_bytes(b"no file of ONNX")
    with OnnxExaminer(provider="TensorrtExecutionProvider") as examiner:
        examiner.open(tmp_path / "m.onnx")
        examiner.run(tmp_path / "m.onnx", {"images": ("float32", (1, 3, 4, 4))})
    with OnnxExaminer() as examiner, pytest.raises(CorruptArtifact, match=r"m\.onnx cannot be opened"):
        examiner.open(tmp_path / "m.onnx")


def test_a_file_that_no_session_here_can_run_is_parsed_all_the_same(tmp_path: Path):
    bf16 = helper.make_tensor_value_info("x", onnx.TensorProto.BFLOAT16, [1, 3, 4, 4])
    weight = helper.make_tensor("w", onnx.TensorProto.BFLOAT16, [2, 3, 1, 1], [1.0] * 6)
    out = helper.make_tensor_value_info("y", onnx.TensorProto.BFLOAT16, [1, 2, 4, 4])
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", [bf16], [out], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no file of ONNX")
    with OnnxExaminer() as examiner:
        examiner.parse(tmp_path / "m.onnx")
        with pytest.raises(CorruptArtifact, match=r"broken\.onnx cannot be read"):
            examiner.parse(tmp_path / "broken.onnx")
