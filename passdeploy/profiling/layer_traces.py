"""Look into a network layer by layer, in whatever runs it: PyTorch, torch.compile, ONNX Runtime or TensorRT.

A layer is what has a weight, and is called as its module is; all else is `ELSEWHERE`. Every one of these tracers slows
a network down, so that times say where time goes, not how much there is of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from passdeploy.errors import RunError, UsageError
from passdeploy.export.trt_sidecar import read_sidecar
from passdeploy.models.prompt import without_prompt
from passdeploy.profiling.candidates import Candidate
from passdeploy.profiling.cuda import stream_of
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.layer_times import ELSEWHERE, LayerTime, trace_layers
from passdeploy.profiling.runners import CompiledRunner, TorchRunner
from passdeploy.profiling.trt_runner import EngineRunner, trace_engine

if TYPE_CHECKING:
    from onnx import GraphProto

TRACEABLE = ("torch", "compile", "ort", "tensorrt")
_CALLS = 20
_WARM_UPS = 3
_OPERATORS = {  # of PyTorch, that take a weight; those of the compiler's CPU fusions among them
    "aten::convolution", "aten::addmm", "aten::mm", "aten::bmm", "mkldnn::_convolution_pointwise",
    "mkldnn::_convolution_pointwise_", "mkldnn::_linear_pointwise",
}  # fmt: skip
_PASSED_ON = ("Cast", "QuantizeLinear", "DequantizeLinear", "Transpose")  # a weight goes through these to its layer


def layers_of(
    candidate: Candidate, backend: str, images: Tensor, *, threads: int, setting: Setting | None = None
) -> list[LayerTime]:
    """Every layer of a network, as `backend` runs it, in the order of a call.

    Args:
        subject: the network, in the form that the backend needs.
        backend: one of `TRACEABLE`.
        images: the batch, shape (batch, 3, height, width).
        threads: of ONNX Runtime.
        setting: device, precision and layout; a CUDA graph shows no layers, and is left out.

    Raises:
        UsageError: nothing looks into this backend, or the network lacks the form.
    """
    require_traceable(backend)
    setting = replace(setting or Setting(), cuda_graph=False)
    if backend == "ort" and candidate.onnx is not None:
        return trace_layers(candidate.onnx, images, threads=threads)
    with stream_of(setting.device_of(backend)):
        if backend in ("torch", "compile") and candidate.module is not None:
            kind = TorchRunner if backend == "torch" else CompiledRunner
            return trace_module(kind(candidate.name, candidate.module, setting=setting), images)
        if backend == "tensorrt" and candidate.engine is not None:
            device = str(setting.device_of(backend))
            runner = EngineRunner(candidate.name, candidate.engine, trust_engine=candidate.trust_engine, device=device)
            return trace_engine_layers(runner, images)
    raise UsageError(f"the {candidate.name} network has no form that {backend} can run.")


def require_traceable(backend: str) -> None:
    """Raise UsageError where nothing looks into `backend`."""
    if backend not in TRACEABLE:
        raise UsageError(f"--layers looks into {', '.join(TRACEABLE)}, not into {backend}: put one of them first.")


def trace_module(runner: TorchRunner, images: Tensor, *, calls: int = _CALLS) -> list[LayerTime]:
    """A module under PyTorch's profiler, eager or compiled; on a GPU it is the device's time that counts.

    A compiled network has no modules left, so operators are told apart by the shapes of their weights, and those with
    the same shape by their order.
    """
    runner.prepare(images)
    layers = _weighted_calls(runner)
    for _ in range(_WARM_UPS):
        runner.run()
    on_gpu = torch.device(runner.device).type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler tells a terminal of GPUs that it does not find
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True, acc_events=True) as seen:
        for _ in range(calls):
            runner.run()
        if on_gpu:
            torch.cuda.synchronize()
    whole, own = (
        ("device_time_total", "self_device_time_total") if on_gpu else ("cpu_time_total", "self_cpu_time_total")
    )
    events: list[Any] = list(seen.events() or ())
    everything = sum(float(getattr(event, own)) for event in events)
    times: dict[str, list[float]] = {}
    waiting = list(layers)
    for event in events:
        if event.name not in _OPERATORS:
            continue
        number = _first_with(waiting, event.input_shapes)
        if number is None:  # the next call has begun
            waiting = list(layers)
            number = _first_with(waiting, event.input_shapes)
        if number is not None:
            times.setdefault(waiting.pop(number)[0], []).append(float(getattr(event, whole)))
    found = []
    for name, module in dict(layers).items():
        if name in times:
            taken = times[name]
            ms = median(taken) * max(1, round(len(taken) / calls)) / 1e3  # a module may be called more than once
            weight: Tensor = module.weight  # type: ignore[assignment]
            found.append(LayerTime(name, tuple(weight.shape), _is_depthwise(module), ms))
    rest = everything - sum(map(sum, times.values()))
    return [*found, LayerTime(ELSEWHERE, (), False, max(rest, 0.0) / calls / 1e3)]


def trace_engine_layers(runner: EngineRunner, images: Tensor) -> list[LayerTime]:
    """An engine under TensorRT's own profiler; its layers carry the names of the ONNX nodes that they were made of.

    Raises:
        RunError: the ONNX file that it was built from is not beside it any more.
    """
    import onnx

    graph = onnx.load(_source_of(runner.path)).graph
    runner.prepare(images)
    return by_weight(trace_engine(runner), weights_of(graph))


def weights_of(graph: GraphProto) -> dict[str, LayerTime]:
    """Name of a node -> its layer, which takes no time yet; weights may be cast or quantised on their way to it."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    origin = {node.output[0]: node.input[0] for node in graph.node if node.op_type in _PASSED_ON}
    found = {}
    for node in graph.node:
        weight = node.input[1] if len(node.input) > 1 and node.op_type not in _PASSED_ON else ""
        while weight in origin:
            weight = origin[weight]
        if len(shapes.get(weight, ())) >= 2:
            groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
            is_depthwise = groups > 1 and shapes[weight][1] == 1
            found[node.name] = LayerTime(weight.removesuffix(".weight"), shapes[weight], is_depthwise, 0.0)
    return found


def by_weight(times: Mapping[str, float], layers: Mapping[str, LayerTime]) -> list[LayerTime]:
    """TensorRT's layers (name -> milliseconds) as layers of the network.

    A fused layer is named after all of its nodes ("conv + relu"); a change of format is named after the layer that it
    is for, and is not that layer.
    """
    found, rest = dict[str, LayerTime](), 0.0
    for name, ms in times.items():
        words = () if name.lower().startswith("reformat") else re.split(r"[\s+(),\[\]]+", name)
        layer = next((layers[word] for word in words if word in layers), None)
        if layer is None:
            rest += ms
        else:
            known = found.get(layer.name, layer)
            found[layer.name] = replace(known, ms=known.ms + ms)
    return [*found.values(), LayerTime(ELSEWHERE, (), False, rest)]


def _source_of(engine: Path) -> Path:
    facts = read_sidecar(engine)
    path = engine.with_name(str(facts.get("onnx")))
    if not path.is_file():
        raise RunError(
            f"layers of {engine.name} are told by the ONNX file that it was built from: {path.name}, which is gone.\n"
            "Export again: passdeploy export --trt --dense"
        )
    return path


def _weighted_calls(runner: TorchRunner) -> list[tuple[str, nn.Module]]:
    """The modules with a weight of two dimensions or more, in the order in which a call reaches them."""
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


def _first_with(waiting: Sequence[tuple[str, nn.Module]], shapes: Sequence[Any]) -> int | None:
    """The first of the modules whose weight, or its transpose, an operator with these inputs has read."""
    read = {tuple(shape) for shape in shapes[1:] if shape and all(isinstance(size, int) for size in shape)}
    for number, (_, module) in enumerate(waiting):
        weight = tuple(module.weight.shape)  # type: ignore[arg-type]
        if weight in read or (len(weight) == 2 and weight[::-1] in read):
            return number
    return None


def _is_depthwise(module: nn.Module) -> bool:
    groups, weight = getattr(module, "groups", 1), module.weight
    return bool(groups > 1 and weight.shape[1] == 1)  # type: ignore[index]
