"""From a model to a program of PyTorch and TensorRT (Torch-TensorRT), saved as `.pt2`.

What TensorRT cannot take stays in PyTorch, which costs a switch between the two each time; how much stayed is
counted and reported. Torch-TensorRT pins its own torch and TensorRT, so it lives in an environment of its own,
and it needs a GPU even to be imported.

Its `compile(ir="dynamo", enabled_precisions=...)` takes that argument and ignores it, so `dynamo.compile` is called
directly, on an exported program; fp16 and bf16 are its own autocast, with float32 inputs and outputs.
"""

from __future__ import annotations

import copy
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
from passdeploy.models.modes import evaluating
from passdeploy.runtime.cuda_driver import require_gpu
from passdeploy.runtime.files import atomic_path
from passdeploy.runtime.versions import package_versions

PROGRAM_PRECISIONS = ("fp32", "fp16", "bf16")
_AUTOCAST_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Releases that were made for each other (from the packages' own requirements).
VERSION_MATRIX = (
    {"torch": "2.14", "torch-tensorrt": "2.14", "tensorrt-cu13": "11.1"},
    {"torch": "2.13", "torch-tensorrt": "2.13", "tensorrt-cu13": "11.0"},
)
_TENSORRT_PART, _PYTORCH_PART = "_run_on_acc", "_run_on_gpu"  # how its partitioner calls the parts for TensorRT and for PyTorch


def load_torch_trt() -> Any:
    """Import `torch_tensorrt`, which fails in many ways, none of them an ImportError.

    Raises:
        MissingError: no GPU, not installed, or its torch and TensorRT are not the ones here.
    """
    require_gpu("a Torch-TensorRT program", hint="Run `passdeploy export --torch-trt` on the machine with the GPU.")
    install = "In an environment of its own: pip install 'passdeploy[torch-trt]'"
    try:
        return import_module("torch_tensorrt")
    except ModuleNotFoundError as error:
        if error.name == "torch_tensorrt":
            raise MissingError(f"Torch-TensorRT is not installed.\n{install}") from error
        raise MissingError(f"Torch-TensorRT does not load: {first_line(error)}\n{version_matrix_text()}\n{install}") from error
    except Exception as error:  # libraries that do not fit together end in a plain Exception, RuntimeError or OSError
        raise MissingError(f"Torch-TensorRT does not load: {first_line(error)}\n{version_matrix_text()}\n{install}") from error


def version_matrix_text() -> str:
    """What is installed, and which releases belong together, in one line."""
    found = package_versions()
    here = ", ".join(f"{name} {found[name]}" for name in VERSION_MATRIX[0] if name in found)
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
        model: on the CPU; left as it was.
        images: real images or noise, (n, 3, height, width).
        path: where to write; a program that fails its gate is renamed to `<name>.set_aside`.
        precision: fp32, fp16 or bf16.
        batch: (min, opt, max).
        options: those that Torch-TensorRT has too.
        limits: what the program must keep.

    Raises:
        MissingError: see `load_torch_trt`.
        ExportError: it cannot be compiled.
        ParityError: it does not compute what the model does.
    """
    torch_trt = load_torch_trt()
    sizes, options = BatchRange.of(batch), options or EngineOptions()
    reference = compute_reference(model, images, batch_sizes=sizes.parity_sizes)
    image_shape = tuple(images.shape[1:])
    input_specs = [
        torch_trt.Input(
            min_shape=(sizes.smallest, *image_shape), opt_shape=(sizes.typical, *image_shape),
            max_shape=(sizes.largest, *image_shape), dtype=torch.float32, name=INPUT,
        )
    ]  # fmt: skip
    module = copy.deepcopy(model).cuda()
    dynamic = None
    if not sizes.is_fixed:
        dynamic = ({0: torch.export.Dim("batch", min=sizes.smallest, max=sizes.largest)},)
    try:
        with torch.no_grad(), evaluating(module):
            example = torch.zeros(sizes.typical if sizes.is_fixed else max(2, sizes.typical), *image_shape).cuda()
            program = torch.export.export(module, (example,), dynamic_shapes=dynamic)
            compiled = torch_trt.dynamo.compile(program, arg_inputs=input_specs, **compile_settings(precision, options))
    except Exception as error:  # exporter, converters and builder raise what they like
        raise ExportError(
            f"Torch-TensorRT cannot compile {type(model).__name__}: {first_line(error)}\n"
            "passdeploy export --trt takes the other road, through ONNX."
        ) from error
    report = partition_report(compiled)
    with atomic_path(path) as draft:
        torch_trt.save(compiled, str(draft), output_format="exported_program", arg_inputs=input_specs)
        try:  # what was saved is judged, not what was compiled
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
    """The keywords of `dynamo.compile`. It takes unknown ones without a word, so only these are ever given.

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
    """How much of a compiled program TensorRT runs, and what stayed in PyTorch.

    Returns:
        `engines`, `torch_parts`, `torch_operations` (how many), and `torch_operators`: which, the most frequent first.
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
    """A module on the GPU behind the two calls of an ONNX Runtime session that parity makes."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.name = INPUT

    def get_inputs(self) -> list[Any]:
        """One input, called as in our ONNX files."""
        return [self]

    def run(self, _: None, inputs: dict[str, Any]) -> list[Any]:
        """The outputs for a batch, as NumPy arrays."""
        with torch.no_grad():
            return [self._module(torch.from_numpy(inputs[INPUT]).cuda()).float().cpu().numpy()]
