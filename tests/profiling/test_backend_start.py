"""Starts of backends: those of the CPU for real, those of a GPU with processes that crash, hang or refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from passdeploy.profiling import backend_start
from passdeploy.profiling.execution import BACKENDS, ON_GPU

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


def test_on_a_cpu_its_backends_start_and_those_of_a_gpu_say_why_not():
    tried = backend_start.try_backends(CPU)
    assert list(tried) == list(BACKENDS)
    assert {name for name, start in tried.items() if start["ok"]} == {"torch", "compile", "ort"}
    assert all("none can be used here" in tried[name]["why"] for name in ON_GPU)
    assert tried["ort"]["device"] == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU here")
def test_a_process_of_its_own_reports_its_start():
    missing = backend_start.try_in_process("ort-cuda", "cuda", 60)
    assert not missing["ok"]
    assert "CUDAExecutionProvider" in missing["why"]


@pytest.mark.parametrize(
    ("code", "limit_s", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 20, "its libraries crashed with SIGSEGV"),
        ("import time; time.sleep(20)", 0.2, "it did not start within 0 s"),
        ("raise ImportError('libnvinfer.so.10')", 20, "ImportError: libnvinfer.so.10"),
    ],
)
def test_a_crash_costs_its_own_process_only(code: str, limit_s: float, words: str, monkeypatch: pytest.MonkeyPatch):
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: real([sys.executable, "-c", code], **options))
    result = backend_start.try_in_process("tensorrt", "cuda", limit_s)
    assert not result["ok"]
    assert words in result["why"]


def test_with_a_gpu_every_backend_of_it_is_started_on_it(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def in_process(backend: str, device: str, limit_s: float) -> dict[str, Any]:
        asked.append((backend, device))
        return {"ok": backend != "torch-trt", "why": "", "seconds": 1.0}

    monkeypatch.setattr(backend_start, "try_in_process", in_process)
    tried = backend_start.try_backends(GPU)
    assert sorted(asked) == sorted((name, "cuda:1") for name in BACKENDS if name != "ort")
    assert (tried["ort"]["ok"], tried["ort"]["device"]) == (True, "cpu")
    assert (tried["torch-trt"]["ok"], tried["tensorrt"]["device"]) == (False, "cuda:1")


def test_a_compiler_that_fails_is_told_from_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'line.cpp:1: fatal error: Python.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(backend_start.MissingError, match=r"c\+\+ cannot compile for Python: .*Python\.h"):
        backend_start.require_cxx_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(backend_start.MissingError, match="there is no C"):
        backend_start.require_cxx_compiler()


def test_the_last_line_of_a_start_is_json(capsys: pytest.CaptureFixture[str]):
    backend_start.main(["torch", "cpu"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"]
