"""Export a network for Torch-TensorRT: lowered, in its precision, and shown on the CPU to compute the same.

In float32 the lowered graph must equal the network. In fp16 and bf16 the cast graph has to keep the limits of the
precision; where it does not, its most sensitive layers stay float32, as in conversion.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.errors import ExportError, ParityError, first_line
from passdeploy.export.artifact import BatchRange
from passdeploy.export.layer_ranking import Converted, convert_until_it_passes
from passdeploy.export.onnx_graph import INPUT
from passdeploy.export.parity import gate_problem, measure_parity
from passdeploy.export.precision import Limits
from passdeploy.export.quiet import quietly
from passdeploy.export.reference import Reference
from passdeploy.export.torch_trt_casting import CAST_TYPES, CastGraph, castable_layers, prepare_for_casting
from passdeploy.export.torch_trt_lowering import (
    LoweredGraph,
    export_graph,
    functional_graph,
    module_of,
    require_same,
)
from passdeploy.export.trt_binding import has_gpu_of_torch
from passdeploy.models.modes import evaluating
from passdeploy.runtime.events import Stage

_RANKING_IMAGES = 32  # a fixed batch is not cut


@dataclass(frozen=True)
class NetworkProgram:
    """The exported graph of a network as Torch-TensorRT gets it."""

    program: torch.export.ExportedProgram  # takes and returns float32; on the GPU, if PyTorch has one
    difference: float  # of the lowered float32 graph from the network on the CPU, relative to the largest output
    kept: tuple[str, ...]  # nodes that stay float32 so that the limits are kept
    kept_modules: tuple[str, ...]  # the modules that they belong to
    beyond_range: tuple[str, ...]  # nodes that stay float32 because a number of theirs is beyond the type's range


def export_network(
    model: nn.Module,
    image_shape: tuple[int, ...],
    sizes: BatchRange,
    precision: str,
    reference: Reference,
    limits: Limits,
    *,
    progress: Stage | None = None,
) -> NetworkProgram:
    """Export `model` in a precision, checked on the CPU.

    Args:
        model: on the CPU; not changed.
        image_shape: (3, height, width).
        sizes: of the batch.
        precision: fp32, fp16 or bf16.
        reference: the model's answers.
        limits: the largest allowed differences from them in fp16 and bf16.
        progress: receives a step for each layer that is measured, if any have to be.

    Raises:
        ExportError: the model cannot be exported, or the lowered graph differs from it.
        ParityError: no graph in this precision keeps the limits.
    """
    with torch.no_grad(), evaluating(model):
        try:
            with quietly():
                graph = functional_graph(export_graph(model, image_shape, sizes))
        except Exception as error:  # the exporter raises all kinds of exceptions
            raise ExportError(
                f"PyTorch cannot export {type(model).__name__}: {first_line(error)}\n"
                "Take whatever depends on values or the batch size out of its forward, or fix the batch: --batch 8,8,8"
            ) from error
        module: nn.Module = LoweredGraph(graph)
        difference = require_same(module, model, reference.batches[0].images)
        kept: tuple[str, ...] = ()
        kept_modules: tuple[str, ...] = ()
        beyond_range: tuple[str, ...] = ()
        if precision in CAST_TYPES:
            with quietly():  # torch 2.11 and older warn of themselves where they copy a graph
                prepared = prepare_for_casting(graph)
            ranked_on = reference.batches[-1].images[: None if sizes.is_fixed else _RANKING_IMAGES]
            kept = _layers_to_keep(prepared, precision, ranked_on, reference, limits, progress)
            kept_modules = tuple(module_of(node) for node in prepared.graph.nodes if node.name in kept)
            with quietly():
                module = CastGraph(prepared, precision, keep=kept)
            beyond_range = tuple(sorted(module.kept - set(kept)))
        with quietly():
            program = export_graph(module, image_shape, sizes)
    if has_gpu_of_torch():
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, "cuda")
    return NetworkProgram(program, difference, kept, kept_modules, beyond_range)


def _layers_to_keep(
    graph: torch.fx.GraphModule,
    precision: str,
    images: Tensor,
    reference: Reference,
    limits: Limits,
    progress: Stage | None,
) -> tuple[str, ...]:
    """Names of the fewest nodes, the most sensitive on `images`, that stay float32 so that `limits` are kept.

    Raises:
        ParityError: no choice of layers keeps them.
    """
    expected = LoweredGraph(graph)(images)

    def convert(keep: Any) -> CastGraph:
        return CastGraph(graph, precision, keep=keep, is_emulated=True)

    def find_problem(cast: CastGraph) -> str | None:
        try:
            return gate_problem(measure_parity(ModuleSession(cast, "cpu"), reference), limits)
        except ParityError as error:
            return str(error)

    def measure_error(cast: CastGraph) -> float:
        error = float((cast(images) - expected).norm())
        return error if error == error else float("inf")  # NaN cannot be sorted

    converted: Converted[CastGraph] = convert_until_it_passes(
        convert, castable_layers(graph), find_problem, measure_error, progress=progress
    )
    if converted.problem is not None:
        raise ParityError(
            f"the {precision} graph for Torch-TensorRT {converted.problem}, whichever layers stay in float32.\n"
            "Export it in fp32; where it loses accuracy or answers, --max-drop allows more."
        )
    return converted.kept


class ModuleSession:
    """A module with the part of an ONNX Runtime session's interface that `measure_parity` uses."""

    name = INPUT

    def __init__(self, module: Any, device: str) -> None:
        self._module, self._device = module, device

    def get_inputs(self) -> list[Any]:
        """Return the one input, whose name is that in our ONNX files."""
        return [self]

    def run(self, _: None, inputs: dict[str, Any]) -> list[Any]:
        """Run a batch on the device, and return the outputs as NumPy arrays."""
        images: Tensor = torch.from_numpy(inputs[INPUT]).to(self._device)
        with torch.no_grad():
            return [self._module(images).float().cpu().numpy()]
