"""Layer traces: time every layer of a network in PyTorch, torch.compile, ONNX Runtime or TensorRT, with its profiler.

A layer is a module with a weight, under the module's name; all other kernels are summed as `ELSEWHERE`. Every profiler
slows the network down, so the times show the shares of the layers, not absolute times.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from passdeploy.errors import RunError, UsageError
from passdeploy.export.trt_sidecar import read_sidecar
from passdeploy.models.prompt import without_prompt
from passdeploy.profiling.candidates import Candidate
from passdeploy.profiling.cuda import side_stream
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.layer_times import ELSEWHERE, LayerTime, trace_onnx_layers, weighted_nodes
from passdeploy.profiling.onnx_layers import nodes_named_in
from passdeploy.profiling.runners import CompiledRunner, TorchRunner
from passdeploy.profiling.trt_runner import EngineRunner, time_engine_layers

TRACEABLE = ("torch", "compile", "ort", "tensorrt")
_TRACED_CALLS = 20
_WARM_UP_CALLS = 3
_WEIGHTED_OPERATORS = {  # operators of PyTorch that read a weight, with the compiler's CPU fusions
    "aten::convolution",
    "aten::addmm",
    "aten::mm",
    "aten::bmm",
    "mkldnn::_convolution_pointwise",
    "mkldnn::_convolution_pointwise_",
    "mkldnn::_linear_pointwise",
}


def trace_layers(
    candidate: Candidate, backend: str, images: Tensor, *, threads: int, setting: Setting | None = None
) -> list[LayerTime]:
    """Time every layer of a network as `backend` runs it, in the order of a call.

    Args:
        candidate: the network, in the form that the backend needs.
        backend: one of `TRACEABLE`.
        images: the batch, shape (batch, 3, height, width).
        threads: of ONNX Runtime.
        setting: device, precision and layout; its CUDA graph is ignored, since a graph shows no layers.

    Raises:
        UsageError: this backend cannot be traced, or the network lacks the form that it needs.
    """
    first_traceable((backend,))
    setting = replace(setting or Setting(), cuda_graph=False)
    if backend == "ort" and candidate.onnx is not None:
        return trace_onnx_layers(candidate.onnx, images, threads=threads)
    with side_stream(setting.device_of(backend)):
        if backend in ("torch", "compile") and candidate.module is not None:
            kind = TorchRunner if backend == "torch" else CompiledRunner
            return trace_module_layers(kind(candidate.name, candidate.module, setting=setting), images)
        if backend == "tensorrt" and candidate.engine is not None:
            device = str(setting.device_of(backend))
            runner = EngineRunner(candidate.name, candidate.engine, trust_engine=candidate.trust_engine, device=device)
            return trace_engine_layers(runner, images)
    raise UsageError(f"the {candidate.name} network has no form that {backend} can run.")


def first_traceable(backends: Sequence[str]) -> str:
    """Return the first of some backends whose layers can be traced.

    Raises:
        UsageError: there is none.
    """
    if traceable := [backend for backend in backends if backend in TRACEABLE]:
        return traceable[0]
    raise UsageError(
        f"--layers looks into {', '.join(TRACEABLE)}, not into {', '.join(backends)}.\nAdd one of them to --backend."
    )


def trace_module_layers(runner: TorchRunner, images: Tensor, *, calls: int = _TRACED_CALLS) -> list[LayerTime]:
    """Time the layers of a module, eager or compiled, with PyTorch's profiler; on a GPU in the device's time.

    A compiled network has no modules left, so an operator is matched to its layer by the shape of its weight, and among
    layers with the same shape by the order of the calls.
    """
    runner.prepare(images)
    layers = _calls_with_weight(runner)
    for _ in range(_WARM_UP_CALLS):
        runner.run()
    on_gpu = torch.device(runner.device).type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else PyTorch's profiler prints about missing GPUs
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        for _ in range(calls):
            runner.run()
        if on_gpu:
            torch.cuda.synchronize()
    total_key, own_key = (
        ("device_time_total", "self_device_time_total") if on_gpu else ("cpu_time_total", "self_cpu_time_total")
    )
    events: list[Any] = list(profiler.events() or ())
    whole_us = sum(float(getattr(event, own_key)) for event in events if not on_gpu or _is_kernel(event))
    times: dict[str, list[float]] = {}  # layer -> microseconds of each of its operators
    waiting = list(layers)  # those whose operators of this call are still to come
    for event in events:
        if event.name not in _WEIGHTED_OPERATORS:
            continue
        number = _first_reading(waiting, event.input_shapes)
        if number is None:  # the next call has begun
            waiting = list(layers)
            number = _first_reading(waiting, event.input_shapes)
        if number is not None:
            times.setdefault(waiting.pop(number)[0], []).append(float(getattr(event, total_key)))
    layer_times = []
    for name, module in dict(layers).items():
        if name in times:
            runs = max(1, round(len(times[name]) / calls))  # a module may run more than once in a call
            weight: Tensor = module.weight  # type: ignore[assignment]
            ms = median(times[name]) * runs / 1e3
            layer_times.append(LayerTime(name, tuple(weight.shape), _is_depthwise(module), ms))
    other_us = whole_us - sum(map(sum, times.values()))
    return [*layer_times, LayerTime(ELSEWHERE, (), False, max(other_us, 0.0) / calls / 1e3)]


def _is_kernel(event: Any) -> bool:
    """True for work of the GPU itself: the operators that launched it have its time as well."""
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def trace_engine_layers(runner: EngineRunner, images: Tensor) -> list[LayerTime]:
    """Time the layers of an engine with TensorRT's profiler, which names them after the ONNX nodes.

    Raises:
        RunError: the ONNX file that the engine was built from is no longer beside it.
    """
    import onnx

    graph = onnx.load(_onnx_source(runner.path)).graph
    runner.prepare(images)
    return merge_trt_layers(time_engine_layers(runner), weighted_nodes(graph))


def merge_trt_layers(times: Mapping[str, float], layers: Mapping[str, LayerTime]) -> list[LayerTime]:
    """Sum the times of TensorRT's layers (name -> milliseconds) over the layers of the network.

    A fused layer counts as the first layer with a weight that it is named after. A change of format, and a long block
    of which only the ends are named, count as none.
    """
    merged, other_ms = dict[str, LayerTime](), 0.0
    for name, ms in times.items():
        layer = next((layers[node] for node in nodes_named_in(name) if node in layers), None)
        if layer is None:
            other_ms += ms
        else:
            known = merged.get(layer.name, layer)
            merged[layer.name] = replace(known, ms=known.ms + ms)
    return [*merged.values(), LayerTime(ELSEWHERE, (), False, other_ms)]


def _onnx_source(engine: Path) -> Path:
    """Find the ONNX file that an engine of a run was built from, which its sidecar names."""
    facts = read_sidecar(engine)
    path = engine.with_name(str(facts.get("onnx")))
    if not path.is_file():
        options = ["--trt", "--dense", "--precision", str(facts.get("precision", "fp32"))]
        options += ["--flavour", "rtx"] if facts.get("flavour") == "rtx" else []
        command = shlex.join(["passdeploy", "export", *options, "--run", str(engine.parent.parent)])
        raise RunError(
            f"layers of {engine.name} are told by the ONNX file that it was built from: {path.name}, which is gone.\n"
            f"Export again: {command}"
        )
    return path


def _calls_with_weight(runner: TorchRunner) -> list[tuple[str, nn.Module]]:
    """Run a forward pass; return the modules with a weight of two or more dimensions in the order they were called."""
    calls: list[tuple[str, nn.Module]] = []
    hooks = []
    for name, module in without_prompt(runner.module).named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() >= 2:
            hooks.append(module.register_forward_hook(lambda module, *_, name=name: calls.append((name, module))))
    try:
        with torch.inference_mode():
            runner.module(runner.images)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _first_reading(waiting: Sequence[tuple[str, nn.Module]], shapes: Sequence[Any]) -> int | None:
    """Return the index of the first module with a weight, or its transpose, among these input shapes of an operator."""
    read = {tuple(shape) for shape in shapes[1:] if shape and all(isinstance(size, int) for size in shape)}
    for number, (_, module) in enumerate(waiting):
        weight = tuple(module.weight.shape)  # type: ignore[arg-type]
        if weight in read or (len(weight) == 2 and weight[::-1] in read):
            return number
    return None


def _is_depthwise(module: nn.Module) -> bool:
    """Test whether a module is a depthwise convolution: grouped, with one input channel per group."""
    groups, weight = getattr(module, "groups", 1), module.weight
    return bool(groups > 1 and weight.shape[1] == 1)  # type: ignore[index]
