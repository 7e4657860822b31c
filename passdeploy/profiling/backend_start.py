"""Test whether a backend really starts on this machine: open a tiny network in it and run it once.

A list of providers or an import says less: libraries may be missing, or not fit the driver. Native code that does not
fit may crash, so backends of a GPU are started in a process of their own, with a time limit:

    python -m passdeploy.profiling.backend_start ort-cuda cuda
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import nn

from passdeploy.errors import MissingError, PassDeployError, first_line, require
from passdeploy.export.ort_session import require_provider
from passdeploy.export.precision import LIMITS
from passdeploy.export.reference import compute_reference
from passdeploy.export.torch_trt import compile_program
from passdeploy.export.trt_api import load_trt
from passdeploy.export.trt_engine import build_engine
from passdeploy.profiling.candidates import Candidate, make_runner
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.runners import PROVIDERS
from passdeploy.runtime.child_process import how_it_ended
from passdeploy.runtime.names import BACKENDS, ON_GPU

_IMAGE_SHAPE = (1, 3, 16, 16)
_LIMIT_S = 75.0  # of one backend; TensorRT and the compiler for a GPU may take a minute when they start cold
_CXX_LIMIT_S = 20.0


def try_backends(device: torch.device, *, limit_s: float = _LIMIT_S) -> dict[str, dict[str, Any]]:
    """Start every backend that can run beside `device`, those of a GPU at the same time.

    Returns:
        Backend -> `ok`, `why` not, the `device` it was started on, and `seconds`.
    """
    on_gpu = device.type == "cuda"
    in_processes = [name for name in BACKENDS if on_gpu and name != "ort"]
    with ThreadPoolExecutor(max(1, len(in_processes))) as pool:
        started = {name: pool.submit(try_in_process, name, str(device), limit_s) for name in in_processes}
        tried = {
            name: started[name].result() if name in started else _timed(partial(_start_here, name)) for name in BACKENDS
        }
    return {name: {**result, "device": _device_name(name, device)} for name, result in tried.items()}


def try_in_process(backend: str, device: str, limit_s: float) -> dict[str, Any]:
    """Start a backend in a process of its own; return `ok`, `why` not, and `seconds`."""
    command = [sys.executable, "-m", "passdeploy.profiling.backend_start", backend, device]
    began = perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"ok": False, "why": f"it did not start within {limit_s:.0f} s", "seconds": limit_s}
    try:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        result = {"ok": False, "why": _death(done), "seconds": round(perf_counter() - began, 2)}
    return result


def start_backend(backend: str, device: str) -> None:
    """Open a tiny network in a backend on a device and run it once.

    Raises:
        PassDeployError: it does not start.
    """
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    images = torch.zeros(_IMAGE_SHAPE)
    if backend in PROVIDERS:
        require_provider(PROVIDERS[backend])
    if backend == "tensorrt":
        load_trt("tensorrt")
    with TemporaryDirectory() as folder:
        candidate = _FORMS[backend](network, Path(folder))
        runner = make_runner(candidate, backend, 1, Setting(device="cpu" if backend == "ort" else device))
        runner.prepare(images)
        runner.run()
        if device != "cpu" and torch.cuda.is_available():
            torch.cuda.synchronize()


def _start_here(backend: str) -> None:
    """Start a backend in this process, on the CPU, where it has one."""
    if backend in ON_GPU:
        raise MissingError("it runs on an NVIDIA GPU, and none can be used here")
    if backend == "compile":
        require_cxx_compiler()
    else:
        start_backend(backend, "cpu")


def require_cxx_compiler() -> None:
    """Check that the C++ compiler that `torch.compile` calls on the CPU works and finds Python's headers.

    Compiling a network takes more than ten seconds the first time, so this compiles one line.

    Raises:
        MissingError: there is none, or it fails.
    """
    names = ["cl"] if sys.platform == "win32" else ["g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, filter(None, [os.environ.get("CXX"), *names]))), None)
    if compiler is None:
        raise MissingError(f"there is no C++ compiler ({' or '.join(names)}), which it needs on the CPU")
    if sys.platform == "win32":
        return  # its options are others
    with TemporaryDirectory() as folder:
        source = Path(folder) / "line.cpp"
        source.write_text("#include <Python.h>\ndouble twice(double x) { return 2 * x; }\n")
        options = ["-shared", "-fPIC", "-I", sysconfig.get_paths()["include"], "-o", str(source.with_suffix(".so"))]
        try:
            done = subprocess.run([compiler, *options, source], capture_output=True, text=True, timeout=_CXX_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise MissingError(f"{compiler} takes more than {_CXX_LIMIT_S:.0f} s for one line") from error
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["it gives no reason"]
        raise MissingError(f"{compiler} cannot compile for Python: {errors[0]}")


def _module(network: nn.Module, folder: Path) -> Candidate:
    return Candidate("tiny", module=network)


def _onnx(network: nn.Module, folder: Path) -> Candidate:
    return Candidate("tiny", onnx=_write_tiny_onnx(folder))


def _engine(network: nn.Module, folder: Path) -> Candidate:
    engine = folder / "tiny.engine"
    build_engine(_write_tiny_onnx(folder), engine, batch=(1, 1, 1))
    return Candidate("tiny", engine=engine)


def _program(network: nn.Module, folder: Path) -> Candidate:
    program = folder / "tiny.pt2"
    reference = compute_reference(network, torch.rand(_IMAGE_SHAPE), batch_sizes=(1,), is_real=False)
    compile_program(network.eval(), reference, program, batch=(1, 1, 1), limits=LIMITS["fp32"])
    return Candidate("tiny", program=program)


_FORMS: Mapping[str, Callable[[nn.Module, Path], Candidate]] = {
    "torch": _module,
    "compile": _module,
    "ort": _onnx,
    "ort-cuda": _onnx,
    "ort-trt": _onnx,
    "tensorrt": _engine,
    "torch-trt": _program,
}


def _write_tiny_onnx(folder: Path) -> Path:
    """Write a graph of one convolution without the exporter, which would take seconds."""
    import numpy as np

    onnx = require("onnx", extra="cpu")
    helper, proto = onnx.helper, onnx.TensorProto
    path = folder / "tiny.onnx"
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "weight"], ["logits"], pads=[1, 1, 1, 1])],
        "tiny",
        [helper.make_tensor_value_info("images", proto.FLOAT, list(_IMAGE_SHAPE))],
        [helper.make_tensor_value_info("logits", proto.FLOAT, [1, 8, *_IMAGE_SHAPE[2:]])],
        [onnx.numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def _timed(work: Callable[[], object]) -> dict[str, Any]:
    """Run a start and describe how it went."""
    began = perf_counter()
    why = ""
    try:
        work()
    except PassDeployError as error:
        why = " ".join(str(error).split())
    except Exception as error:  # whatever a library raises means that the backend does not start
        why = f"{type(error).__name__}: {first_line(error)}"
    return {"ok": not why, "why": why, "seconds": round(perf_counter() - began, 2)}


def _death(done: subprocess.CompletedProcess[str]) -> str:
    """Say how a process ended that wrote no result."""
    last = (done.stderr.strip().splitlines() or [""])[-1][:200]
    if done.returncode < 0:
        return f"its libraries crashed with {how_it_ended(done.returncode)}. {last}".rstrip(" .")
    return last or f"its process ended with {done.returncode}"


def _device_name(backend: str, device: torch.device) -> str:
    """Return the device that a backend is started on."""
    return str(Setting(device=str(device)).device_of(backend))


def main(arguments: Sequence[str]) -> None:
    """Start the backend `arguments[0]` on the device `arguments[1]`, and print a line of JSON."""
    backend, device = arguments
    result = _timed(partial(start_backend, backend, device))
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
