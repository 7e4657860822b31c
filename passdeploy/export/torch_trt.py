"""Compile a model with Torch-TensorRT, save the program as `.pt2`, and compare it with the model.

The network is exported by torch_trt_network.py, lowered and in its precision, so that Torch-TensorRT builds what our
ONNX files would: strongly typed, with float32 inputs and outputs. Its `compile(ir="dynamo", enabled_precisions=...)`
accepts that argument and ignores it, so `dynamo.compile` is called directly. What was built is looked at
(torch_trt_report.py) before it is saved (torch_trt_program.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from passdeploy.errors import ExportError, ParityError, UsageError, first_line
from passdeploy.export.artifact import Artifact, BatchRange, describe_artifact
from passdeploy.export.drafts import set_aside
from passdeploy.export.onnx_graph import INPUT
from passdeploy.export.parity import gate_problem, measure_parity
from passdeploy.export.precision import Limits
from passdeploy.export.quiet import quietly
from passdeploy.export.reference import Reference
from passdeploy.export.torch_trt_lowering import is_operator
from passdeploy.export.torch_trt_network import ModuleSession, export_network
from passdeploy.export.torch_trt_program import write_program
from passdeploy.export.torch_trt_release import load_torch_trt
from passdeploy.export.torch_trt_report import Census, engine_bytes, partition_report, require_precision
from passdeploy.export.trt_api import Flavour
from passdeploy.export.trt_binding import has_gpu_of_torch
from passdeploy.export.trt_engine import EngineOptions
from passdeploy.export.trt_parity import engine_limits
from passdeploy.runtime.events import Stage
from passdeploy.runtime.files import atomic_path
from passdeploy.runtime.versions import package_versions

PROGRAM_PRECISIONS = ("fp32", "fp16", "bf16")
_SMALLEST_ENGINE = 5  # operators; fewer between two that stay in PyTorch are not worth two switches


def compile_program(
    model: nn.Module,
    reference: Reference,
    path: Path,
    *,
    precision: str = "fp32",
    batch: Sequence[int] = (1, 8, 32),
    options: EngineOptions | None = None,
    limits: Limits,
    flavour: Flavour | None = None,
    final: Path | None = None,
    progress: Stage | None = None,
) -> Artifact:
    """Compile `model` for this machine's GPU, save it as `path` (.pt2) and compare it with the model.

    Args:
        model: on the CPU; not changed.
        reference: its answers, at batch sizes within `batch`.
        path: where to write; a program that fails its parity check is renamed to `<name>.rejected`.
        precision: fp32, fp16 or bf16.
        batch: (min, opt, max).
        options: engine options, of those that Torch-TensorRT has too.
        limits: the largest allowed differences from the model.
        flavour: of the Torch-TensorRT to compile with; None: the one that is installed.
        final: the path that the file will get if it passes; None: `path`.
        progress: receives a step for each layer that is measured, where fp16 or bf16 fails its limits.

    Returns:
        The artifact. It has no fact "parity" where PyTorch cannot use a GPU, and so nothing was run.

    Raises:
        MissingError: see `load_torch_trt`.
        ExportError: Torch-TensorRT cannot compile the model, or not in this precision.
        ParityError: the program differs from the model by more than `limits` allow.
    """
    torch_trt, flavour = load_torch_trt(flavour)
    sizes, options = BatchRange.of(batch), options or EngineOptions()
    settings, image_shape = compile_settings(options, flavour), reference.image_shape
    network = export_network(model, image_shape, sizes, precision, reference, limits, progress=progress)
    census = Census()
    observer = import_module("torch_tensorrt.dynamo.conversion._TRTInterpreter").TRT_INTERPRETER_CALL_PRE_OBSERVER
    with observer.add(census.count):  # is called with each graph that becomes an engine
        compiled = run_compiler(torch_trt, network.program, image_shape, sizes, settings, type(model).__name__)
    facts: dict[str, Any] = {
        "flavour": flavour,
        "batch": sizes.as_list(),
        **partition_report(compiled),
        "engine_bytes": engine_bytes(compiled),
        "census": census.to_json(),
        "kept": list(network.kept),
        "kept_modules": list(network.kept_modules),
        "beyond_range": list(network.beyond_range),
        "lowered_difference": network.difference,
        "versions": package_versions(),
    }
    require_precision(
        census, precision, facts["engine_bytes"], flavour, has_kept=bool(network.kept or network.beyond_range)
    )
    with atomic_path(path) as draft:
        device = "cuda" if has_gpu_of_torch() else "cpu"
        example = torch.zeros(sizes.typical, *image_shape, device=device)
        write_program(torch_trt, compiled, draft, example, {**facts, "precision": precision})
        if has_gpu_of_torch():
            try:  # compare the saved program, not the compiled one
                session = ModuleSession(torch_trt.load(str(draft)).module(), device)
                parity = measure_parity(session, reference, ran="torch-tensorrt on the GPU")
                facts["parity"] = parity.to_json()
                problem = gate_problem(parity, engine_limits(limits, precision, tf32=options.tf32))
            except ParityError as error:
                problem = str(error)
            if problem is not None:
                raise set_aside(draft, problem, final or path)
    return describe_artifact(path, kind="program", precision=precision, facts=facts)


def preview_program(
    model: nn.Module,
    reference: Reference,
    *,
    precision: str = "fp32",
    batch: Sequence[int] = (1, 8, 32),
    options: EngineOptions | None = None,
    limits: Limits,
    flavour: Flavour | None = None,
) -> dict[str, Any]:
    """Tell what `compile_program` with these arguments would make, without building anything.

    The reference must have answers at the batch size that the program would be tuned for, too.

    Returns:
        See `partition_report`; and `operators` in all, `coverage` (the share of them in engines), `census`, `kept`,
        `beyond_range`, `lowered_difference` and `flavour`; where something stays in PyTorch with an open batch,
        `engines_with_fixed_batch` too.

    Raises:
        MissingError, ExportError: see `compile_program`.
    """
    torch_trt, flavour = load_torch_trt(flavour)
    sizes, options = BatchRange.of(batch), options or EngineOptions()
    settings = compile_settings(options, flavour) | {"dryrun": True}
    image_shape, name = reference.image_shape, type(model).__name__
    network = export_network(model, image_shape, sizes, precision, reference, limits)
    dry = run_compiler(torch_trt, network.program, image_shape, sizes, settings, name)
    census = Census.of(dry)
    report = partition_report(dry)
    operators = census.operators + report["torch_operations"]
    facts: dict[str, Any] = {
        "flavour": flavour,
        "batch": sizes.as_list(),
        **report,
        "operators": operators,
        "coverage": round(census.operators / max(1, operators), 4),
        "census": census.to_json(),
        "kept": list(network.kept),
        "kept_modules": list(network.kept_modules),
        "beyond_range": list(network.beyond_range),
        "lowered_difference": network.difference,
    }
    if report["torch_operations"] and not sizes.is_fixed:
        fixed = BatchRange(sizes.typical, sizes.typical, sizes.typical)
        network = export_network(model, image_shape, fixed, precision, reference.at(sizes.typical), limits)
        fixed_report = partition_report(run_compiler(torch_trt, network.program, image_shape, fixed, settings, name))
        facts["engines_with_fixed_batch"] = fixed_report["engines"]
    return facts


def run_compiler(
    torch_trt: Any,
    program: torch.export.ExportedProgram,
    image_shape: tuple[int, ...],
    sizes: BatchRange,
    settings: dict[str, Any],
    name: str,
) -> GraphModule:
    """Call Torch-TensorRT's compiler.

    Args:
        torch_trt: the module.
        program: an exported network that takes float32 images.
        image_shape: (3, height, width).
        sizes: of the batch.
        settings: of `compile_settings`; "dryrun" with them to only partition the graph.
        name: of the model, for errors.

    Raises:
        ExportError: the compiler fails.
    """
    shapes = [(size, *image_shape) for size in sizes.as_list()]
    shape = (
        {"shape": shapes[0]}
        if sizes.is_fixed
        else dict(zip(("min_shape", "opt_shape", "max_shape"), shapes, strict=True))
    )
    operators = sum(map(is_operator, program.graph.nodes))
    settings = {"min_block_size": _SMALLEST_ENGINE if operators >= _SMALLEST_ENGINE else 1, **settings}
    try:
        with torch.no_grad(), quietly():
            described = torch_trt.Input(dtype=torch.float32, name=INPUT, **shape)
            compiled: GraphModule = torch_trt.dynamo.compile(program, arg_inputs=[described], **settings)
    except Exception as error:  # the converters and the builder raise all kinds of exceptions
        raise ExportError(
            f"Torch-TensorRT cannot compile {name}: {first_line(error)}\n"
            "Try a fixed batch (--batch 8,8,8), or passdeploy export --trt, which builds an engine through ONNX."
        ) from error
    return compiled


def compile_settings(options: EngineOptions, flavour: Flavour) -> dict[str, Any]:
    """Return the keywords for `dynamo.compile`, which silently ignores those that it does not know.

    Raises:
        UsageError: an option that Torch-TensorRT programs do not have here.
    """
    options.require_possible(flavour)
    if options.weight_stripped:
        raise UsageError("--weight-stripped is for engines: leave it out of --torch-trt.")
    settings: dict[str, Any] = {
        "optimization_level": options.optimization_level,
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
        "immutable_weights": not options.refittable,
        "disable_tf32": not options.tf32,
    }
    if options.workspace_bytes is not None:
        settings["workspace_size"] = options.workspace_bytes
    if options.timing_cache is not None:
        settings["timing_cache_path"] = str(options.timing_cache)
    return settings
