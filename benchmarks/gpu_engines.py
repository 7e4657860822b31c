"""What TensorRT engines promise, tried with the engines of a run: each part returns JSON values, or raises.

Used by `benchmarks/gpu.py`. Every part takes the folder in which `engines` left a run (`runs/latest`), and compares
what an engine answers with the PyTorch model or with another way to run the same engine.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.errors import CorruptArtifact, UsageError
from passdeploy.export import EngineOptions, build_engine, export_onnx, load_engine
from passdeploy.export.parity import compute_reference, errors_between
from passdeploy.export.precision import LIMITS
from passdeploy.export.trt_binding import BoundEngine
from passdeploy.export.trt_log import BuilderLog, make_logger
from passdeploy.export.trt_parity import require_engine_parity
from passdeploy.export.trt_refit import refit_
from passdeploy.export.trt_sidecar import sidecar_path
from passdeploy.profiling.cuda import capture_graph, side_stream

BATCHES = (1, 3, 8, 32)


def _exported(work: Path) -> Path:
    return work / "runs" / "latest" / "export"


def _run(bound: BoundEngine) -> Tensor:
    bound.enqueue()
    torch.cuda.synchronize()
    return next(iter(bound.outputs.values())).float().cpu().clone()


def open_batch(work: Path) -> Mapping[str, Any]:
    """Compare the answers of one engine to a batch with those to its images one by one; refuse what is too large."""
    path = _exported(work) / "model-fp16.engine"
    trt, engine = load_engine(path)
    shape = tuple(engine.get_tensor_shape(engine.get_tensor_name(0)))[1:]
    images = torch.randn(max(BATCHES), *shape)
    single = torch.cat([_run(BoundEngine(trt, engine, image[None], file=path.name)) for image in images])
    errors = {
        batch: errors_between(_run(BoundEngine(trt, engine, images[:batch], file=path.name)), single[:batch])[1]
        for batch in BATCHES
    }
    try:
        BoundEngine(trt, engine, torch.zeros(33, *shape), file=path.name)
    except UsageError as error:
        return {"rel_error_to_single_images": errors, "batch_33": str(error)}
    raise AssertionError("a batch outside the optimisation profile was accepted")


def cuda_graph(work: Path) -> Mapping[str, Any]:
    """Compare the answers of a replayed CUDA graph with those of plain calls, on images that changed after capture."""
    path = _exported(work) / "model-fp16.engine"
    trt, engine = load_engine(path)
    shape = tuple(engine.get_tensor_shape(engine.get_tensor_name(0)))[1:]
    equal = {}
    for batch in BATCHES:
        with side_stream(torch.device("cuda")):
            bound = BoundEngine(trt, engine, torch.zeros(batch, *shape), file=path.name)
            replay = capture_graph(bound.enqueue, path.name)
            images = torch.randn(batch, *shape, device="cuda")
            bound.images.copy_(images)
            replay()
            torch.cuda.synchronize()
            replayed = next(iter(bound.outputs.values())).clone()
            bound.enqueue()
            torch.cuda.synchronize()
            equal[batch] = bool(torch.equal(replayed, next(iter(bound.outputs.values()))))
    if not all(equal.values()):
        raise AssertionError(f"a replay differs from a call: {equal}")
    return {"bit_identical": equal}


def tf32(work: Path) -> Mapping[str, Any]:
    """Compare float32 engines with and without TF32 with their model."""
    network, onnx_path = _small_network(work)
    reference = compute_reference(network, torch.randn(8, 3, 64, 64), batch_sizes=(1, 8), is_real=False)
    errors = {}
    for name, options in {"tf32": EngineOptions(), "no_tf32": EngineOptions(tf32=False)}.items():
        engine = build_engine(onnx_path, work / f"{name}.engine", batch=(1, 8, 8), options=options)
        _, parity = require_engine_parity(engine, reference, LIMITS["fp32"])
        errors[name] = parity.max_rel_error
    return {"rel_error": errors}


def refit(work: Path) -> Mapping[str, Any]:
    """Put other weights into a refittable engine, and compare its answers with the network of those weights."""
    network, onnx_path = _small_network(work)
    began = perf_counter()
    path = build_engine(
        onnx_path, work / "refit.engine", batch=(1, 8, 8), options=EngineOptions(refittable=True, tf32=False)
    ).path
    built = perf_counter() - began
    other, other_onnx = _small_network(work, seed=1)
    images = torch.randn(8, 3, 64, 64)
    trt, engine = load_engine(path)
    log = BuilderLog()
    logger = make_logger(trt, log)
    began = perf_counter()
    refit_(trt, engine, other_onnx, logger, log, path.name)
    seconds = perf_counter() - began
    answers = _run(BoundEngine(trt, engine, images, file=path.name))
    with torch.no_grad():
        error, unrefitted = (errors_between(answers, model(images))[1] for model in (other, network))
    if error > 1e-3 or unrefitted < 1e-2:
        raise AssertionError(f"refitted: off by {error:.1e}; from the first network by {unrefitted:.1e}")
    return {"rel_error": error, "seconds_to_refit": seconds, "seconds_to_build": built}


def stripped(work: Path) -> Mapping[str, Any]:
    """Build an engine without weights, load it with those of the ONNX file beside it, and compare it."""
    network, onnx_path = _small_network(work)
    reference = compute_reference(network, torch.randn(8, 3, 64, 64), batch_sizes=(1, 8), is_real=False)
    sizes, errors = {}, {}
    for name, options in {
        "whole": EngineOptions(tf32=False),
        "stripped": EngineOptions(weight_stripped=True, tf32=False),
    }.items():
        engine = build_engine(onnx_path, onnx_path.with_name(f"{name}.engine"), batch=(1, 8, 8), options=options)
        engine, parity = require_engine_parity(engine, reference, LIMITS["fp32"])
        sizes[name], errors[name] = engine.size_bytes, parity.max_rel_error
    return {"bytes": sizes, "rel_error": errors}


def compatible(work: Path) -> Mapping[str, Any]:
    """Build version- and hardware-compatible engines; the first carries code of its own and needs to be trusted."""
    network, onnx_path = _small_network(work)
    reference = compute_reference(network, torch.randn(8, 3, 64, 64), batch_sizes=(1, 8), is_real=False)
    found: dict[str, Any] = {}
    for name, options in {
        "hardware": EngineOptions(hardware_compatible=True),
        "version": EngineOptions(version_compatible=True),
    }.items():
        try:
            engine = build_engine(onnx_path, work / f"{name}.engine", batch=(1, 8, 8), options=options)
            engine, parity = require_engine_parity(engine, reference, LIMITS["fp32"])
            found[name] = {"bytes": engine.size_bytes, "rel_error": parity.max_rel_error}
        except Exception as error:
            found[name] = {"failed": " ".join(f"{type(error).__name__}: {error}".split())}
            continue
        if name == "version":
            try:
                load_engine(engine.path)
            except UsageError as error:
                found[name]["untrusted"] = str(error)
    return found


def sidecars(work: Path) -> Mapping[str, Any]:
    """Refuse an engine with a flipped bit, and one with the sidecar of another."""
    exported = _exported(work)
    refusals = {}
    for name in ("flipped bit", "other sidecar"):
        copy = work / "copied.engine"
        shutil.copyfile(exported / "model-fp16.engine", copy)
        if name == "flipped bit":
            shutil.copyfile(sidecar_path(exported / "model-fp16.engine"), sidecar_path(copy))
            content = bytearray(copy.read_bytes())
            content[len(content) // 2] ^= 1
            copy.write_bytes(content)
        else:
            shutil.copyfile(sidecar_path(exported / "model.engine"), sidecar_path(copy))
        try:
            load_engine(copy)
        except CorruptArtifact as error:
            refusals[name] = str(error)
            continue
        raise AssertionError(f"{name}: the engine was loaded")
    return {"refused": refusals}


def _small_network(work: Path, seed: int = 0) -> tuple[nn.Module, Path]:
    """Make a network with convolutions and a classifier, and its ONNX file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, 10),
        ).eval()
    path = work / f"small-{seed}.onnx"
    export_onnx(network, torch.zeros(1, 3, 64, 64), path, batch=(1, 8, 8))
    return network, path


ENGINE_PARTS: Mapping[str, Callable[[Path], Mapping[str, Any]]] = {
    "open_batch": open_batch,
    "cuda_graph": cuda_graph,
    "tf32": tf32,
    "refit": refit,
    "stripped": stripped,
    "compatible": compatible,
    "sidecars": sidecars,
}
