"""Compile a model with Torch-TensorRT, save the program as `.pt2`, and compare it with the model.

Operators that TensorRT does not support stay in PyTorch, and each change between the two costs time, so
`partition_report` counts them. Torch-TensorRT pins its own torch and TensorRT, so it needs an environment of its own,
and a GPU even to be imported.

Its `compile(ir="dynamo", enabled_precisions=...)` accepts that argument and ignores it, so `dynamo.compile` is called
directly, on an exported program; fp16 and bf16 use its autocast, with float32 inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.errors import ExportError, MissingError, ParityError, UsageError, first_line
from passdeploy.export.artifact import Artifact, BatchRange, describe_artifact
from passdeploy.export.onnx_graph import INPUT
from passdeploy.export.parity import compute_reference, gate_problem, measure_parity, set_aside
from passdeploy.export.precision import Limits
from passdeploy.export.trt_engine import EngineOptions
from passdeploy.models.cloning import deep_copy
from passdeploy.models.modes import evaluating
from passdeploy.runtime.cuda_driver import require_gpu
from passdeploy.runtime.files import atomic_path
from passdeploy.runtime.versions import package_versions

PROGRAM_PRECISIONS = ("fp32", "fp16", "bf16")
_AUTOCAST_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Releases that belong together (from the packages' own requirements).
VERSION_MATRIX = (
    {"torch": "2.14", "torch-tensorrt": "2.14", "tensorrt-cu13": "11.1"},
    {"torch": "2.13", "torch-tensorrt": "2.13", "tensorrt-cu13": "11.0"},
)
# Prefixes that Torch-TensorRT's partitioner gives to the submodules.
_TENSORRT_PART, _PYTORCH_PART = "_run_on_acc", "_run_on_gpu"


def load_torch_trt() -> Any:
    """Import `torch_tensorrt`, and turn all the exceptions with which that can fail into a MissingError.

    Raises:
        MissingError: no GPU, not installed, or made for another torch or TensorRT than those installed.
    """
    require_gpu("a Torch-TensorRT program", hint="Run `passdeploy export --torch-trt` on the machine with the GPU.")
    install = "In an environment of its own: pip install 'passdeploy[torch-trt]'"
    try:
        return import_module("torch_tensorrt")
    except ModuleNotFoundError as error:
        if error.name == "torch_tensorrt":
            raise MissingError(f"Torch-TensorRT is not installed.\n{install}") from error
        raise _load_failure(error, install) from error
    except Exception as error:  # libraries that do not fit together end in a plain Exception, RuntimeError or OSError
        raise _load_failure(error, install) from error


def _load_failure(error: Exception, install: str) -> MissingError:
    """Make the error for a Torch-TensorRT that is installed and does not load."""
    return MissingError(f"Torch-TensorRT does not load: {first_line(error)}\n{version_matrix_text()}\n{install}")


def version_matrix_text() -> str:
    """State in one line the releases that are installed, and those that belong together."""
    installed = package_versions()
    here = ", ".join(f"{name} {installed[name]}" for name in VERSION_MATRIX[0] if name in installed)
    fitting = "; ".join(", ".join(f"{name} {release}" for name, release in row.items()) for row in VERSION_MATRIX)
    return f"Here: {here}. Made for each other: {fitting}."


def compile_program(
    model: nn.Module,
    images: Tensor,
    path: Path,
    *,
    precision: str = "fp32",
    batch: Sequence[int] = (1, 8, 32),
    options: EngineOptions | None = None,
    limits: Limits,
) -> Artifact:
    """Compile `model` for this machine's GPU, save it as `path` (.pt2) and compare it with the model.

    Args:
        model: on the CPU; not changed.
        images: real images or noise, (n, 3, height, width).
        path: where to write; a program that fails its parity check is renamed to `<name>.rejected`.
        precision: fp32, fp16 or bf16.
        batch: (min, opt, max).
        options: engine options, of those that Torch-TensorRT has too.
        limits: the largest allowed differences from the model.

    Raises:
        MissingError: see `load_torch_trt`.
        ExportError: Torch-TensorRT cannot compile the model.
        ParityError: the program differs from the model by more than `limits` allow.
    """
    torch_trt = load_torch_trt()
    sizes, options = BatchRange.of(batch), options or EngineOptions()
    reference = compute_reference(model, images, batch_sizes=sizes.parity_sizes)
    image_shape = tuple(images.shape[1:])
    input_specs = [
        torch_trt.Input(
            min_shape=(sizes.smallest, *image_shape),
            opt_shape=(sizes.typical, *image_shape),
            max_shape=(sizes.largest, *image_shape),
            dtype=torch.float32,
            name=INPUT,
        )
    ]
    module = deep_copy(model).cuda()
    dynamic = None
    if not sizes.is_fixed:
        dynamic = ({0: torch.export.Dim("batch", min=sizes.smallest, max=sizes.largest)},)
    try:
        with torch.no_grad(), evaluating(module):
            example = torch.zeros(sizes.typical if sizes.is_fixed else max(2, sizes.typical), *image_shape).cuda()
            program = torch.export.export(module, (example,), dynamic_shapes=dynamic)
            compiled = torch_trt.dynamo.compile(program, arg_inputs=input_specs, **compile_settings(precision, options))
    except Exception as error:  # the exporter, the converters and the builder raise all kinds of exceptions
        raise ExportError(
            f"Torch-TensorRT cannot compile {type(model).__name__}: {first_line(error)}\n"
            "Try passdeploy export --trt, which builds an engine through ONNX."
        ) from error
    report = partition_report(compiled)
    with atomic_path(path) as draft:
        torch_trt.save(compiled, str(draft), output_format="exported_program", arg_inputs=input_specs)
        try:  # compare the saved program, not the compiled one
            saved = torch_trt.load(str(draft)).module()
            parity = measure_parity(_SessionAdapter(saved), reference, ran="torch-tensorrt on the GPU")
            problem = gate_problem(parity, limits)
        except ParityError as error:
            problem = str(error)
        if problem is not None:
            raise set_aside(draft, problem, path)
    facts = {"batch": sizes.as_list(), **report, "parity": parity.to_json(), "versions": package_versions()}
    return describe_artifact(path, kind="program", precision=precision, facts=facts)


def compile_settings(precision: str, options: EngineOptions) -> dict[str, Any]:
    """Return the keywords for `dynamo.compile`, which silently ignores those that it does not know.

    Raises:
        UsageError: an option that Torch-TensorRT programs do not have here.
    """
    if options.weight_stripped:
        raise UsageError("--weight-stripped is for engines: leave it out of --torch-trt.")
    settings: dict[str, Any] = {
        "optimization_level": options.optimization_level,
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
        "immutable_weights": not options.refittable,
    }
    if options.workspace_bytes is not None:
        settings["workspace_size"] = options.workspace_bytes
    if options.timing_cache is not None:
        settings["timing_cache_path"] = str(options.timing_cache)
    if precision in _AUTOCAST_TYPES:
        settings |= {"enable_autocast": True, "autocast_low_precision_type": _AUTOCAST_TYPES[precision]}
    return settings


def partition_report(compiled: nn.Module) -> dict[str, Any]:
    """Count the TensorRT engines of a compiled program, and the operations that stayed in PyTorch.

    Returns:
        Counts `engines`, `torch_parts` and `torch_operations`; and `torch_operators`, name -> count, largest first.
    """
    operators: dict[str, int] = {}
    parts = {name: part for name, part in compiled.named_children() if _PYTORCH_PART in name}
    for graph in (compiled, *parts.values()):
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            name = getattr(node.target, "__name__", str(node.target))
            if node.op in ("call_function", "call_method") and name != "getitem":
                operators[name] = operators.get(name, 0) + 1
    return {
        "engines": sum(_TENSORRT_PART in name for name, _ in compiled.named_children()),
        "torch_parts": len(parts),
        "torch_operations": sum(operators.values()),
        "torch_operators": dict(sorted(operators.items(), key=lambda item: -item[1])),
    }


class _SessionAdapter:
    """A module on the GPU with the part of an ONNX Runtime session's interface that `measure_parity` uses."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.name = INPUT

    def get_inputs(self) -> list[Any]:
        """Return the one input, whose name is that in our ONNX files."""
        return [self]

    def run(self, _: None, inputs: dict[str, Any]) -> list[Any]:
        """Run a batch on the GPU, and return the outputs as NumPy arrays."""
        with torch.no_grad():
            return [self._module(torch.from_numpy(inputs[INPUT]).cuda()).float().cpu().numpy()]
