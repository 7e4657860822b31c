"""Report of what Torch-TensorRT makes of a network: engines, operators that stay in PyTorch and where, types of layers.

Operators that TensorRT does not support stay in PyTorch, and each switch between the two costs a launch and keeps
TensorRT from fusing across it. A dry run has the same partition as a build, so it tells all of this but the bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passdeploy.errors import ExportError, enumerated
from passdeploy.export.torch_trt_lowering import is_operator, operator_name, source_line, weight_of
from passdeploy.export.trt_api import Flavour

# Prefixes that Torch-TensorRT's partitioner gives to the submodules.
_TENSORRT_PART, _PYTORCH_PART = "_run_on_acc", "_run_on_gpu"
_PRECISIONS: Mapping[torch.dtype, str] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Operators that multiply with weights or with one another.
_PRODUCTS = frozenset(
    """
    convolution conv1d conv2d conv3d conv_transpose2d linear addmm mm bmm matmul baddbmm scaled_dot_product_attention
    """.split()  # noqa: SIM905
)
_SMALL_WEIGHTS = 4 << 20  # bytes; below, most of an engine may be code
_CODE_PER_LAYER = 50_000  # bytes of an engine beside its weights, at most; 5 to 46 kB in `benchmarks.torch_trt`


def partition_report(compiled: nn.Module) -> dict[str, Any]:
    """Count the TensorRT engines of a compiled program, and the operations that stayed in PyTorch.

    Args:
        compiled: by `dynamo.compile`, dry or not.

    Returns:
        Counts `engines`, `torch_parts`, `torch_operations`, and `switches` from one to the other; `torch_operators`,
        name -> count, largest first; `torch_lines`, operator and source line of each, in the order of the graph.
    """
    left = list(_left_in_pytorch(compiled))
    operators = Counter(operator_name(node) for node in left)
    parts = [name for name, _ in compiled.named_children() if _TENSORRT_PART in name or _PYTORCH_PART in name]
    kinds = [_TENSORRT_PART in name for name in parts]
    return {
        "engines": sum(kinds),
        "torch_parts": len(kinds) - sum(kinds),
        "torch_operations": len(left),
        "switches": sum(first != second for first, second in pairwise(kinds)),
        "torch_operators": dict(sorted(operators.items(), key=lambda item: -item[1])),
        "torch_lines": list(dict.fromkeys(f"{operator_name(node)} {source_line(node)}".rstrip() for node in left)),
    }


def _left_in_pytorch(compiled: nn.Module) -> Iterator[Node]:
    """Yield the operators outside of the engines."""
    for name, part in (("", compiled), *compiled.named_children()):
        if (not name or _PYTORCH_PART in name) and isinstance(part, GraphModule):
            yield from (node for node in part.graph.nodes if is_operator(node))


class Census:
    """Counts of the operators that become layers of engines, and of their weights, by precision.

    The build is strongly typed: the types of the graphs that Torch-TensorRT converts are those of the engines' layers.
    """

    def __init__(self) -> None:
        self.layers: Counter[str] = Counter()  # precision -> operators
        self.products: Counter[str] = Counter()  # precision -> convolutions, matrix products and attention
        self.weights: Counter[str] = Counter()  # precision -> bytes

    @classmethod
    def of(cls, dry: nn.Module) -> Census:
        """Count the engines-to-be of a dry run."""
        census = cls()
        for name, part in dry.named_children():
            if _TENSORRT_PART in name and isinstance(part, GraphModule):
                census.count(part)
        return census

    @property
    def operators(self) -> int:
        """The number of operators in engines, those on integers among them."""
        return self.layers.total()

    def count(self, graph: GraphModule) -> None:
        """Add a graph that becomes an engine."""
        for node in graph.graph.nodes:
            if is_operator(node):
                precision = _precision_of(node.meta.get("val"))
                self.layers[precision] += 1
                if operator_name(node) in _PRODUCTS:
                    self.products[precision] += 1
            elif node.op == "get_attr":
                weight = weight_of(graph, node)
                if weight is not None and weight.is_floating_point():
                    self.weights[_precision_of(weight)] += weight.numel() * weight.element_size()

    def to_json(self) -> dict[str, dict[str, int]]:
        """Return the counts as JSON values."""
        return {name: dict(sorted(getattr(self, name).items())) for name in ("layers", "products", "weights")}


def _precision_of(values: Any) -> str:
    """Return the precision of the first tensor among the results of an operator: `fp32`, ..., or `other`."""
    tensors = (value for value in pytree.tree_leaves(values) if isinstance(value, Tensor))
    first = next(tensors, None)
    return _PRECISIONS.get(first.dtype, "other") if first is not None else "other"


def engine_bytes(compiled: nn.Module) -> list[int]:
    """Sizes of the engines of a compiled program, in their order."""
    plans = [getattr(part, "serialized_engine", None) for _, part in compiled.named_children()]
    return [len(plan) for plan in plans if plan is not None]


def require_precision(census: Census, precision: str, sizes: list[int], flavour: Flavour, *, has_kept: bool) -> None:
    """Check that a program computes in the precision that was asked for, and that its engines have such weights.

    Args:
        census: of what was built.
        precision: that was asked for.
        sizes: bytes of each engine.
        flavour: engines for RTX GPUs hold the weights and some code, so their size shows the type as well.
        has_kept: layers stay float32 with a reason, so that their weights do not count.

    Raises:
        ExportError: no product is in that precision, most weights are not, or the engines are too large for it.
    """
    counts = census.products or census.layers
    if counts and precision not in counts:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ExportError(f"asked {precision}, found 0 of {counts.total()} products in it ({found}).")
    total = census.weights.total()
    if not has_kept and 2 * census.weights[precision] < total:
        found = ", ".join(f"{size / 1e6:.1f} MB {name}" for name, size in census.weights.items())
        raise ExportError(f"asked {precision}, but most of the weights are not ({found}).")
    # 16 bits that are stored as float32 take as much again; in a small network the code may hide that.
    unexplained = sum(sizes) - total - _CODE_PER_LAYER * census.layers.total()
    if flavour == "rtx" and total > _SMALL_WEIGHTS and 2 * unexplained > total:
        raise ExportError(
            f"asked {precision}, whose weights take {total / 1e6:.1f} MB; the engines take {sum(sizes) / 1e6:.1f} MB:\n"
            "the builder has stored them in another type."
        )


def describe(report: Mapping[str, Any]) -> str:
    """Say in a line what a report says: engines, and what stays in PyTorch with its first source lines."""
    engines = f"{report['engines']} engine{'' if report['engines'] == 1 else 's'}"
    if not report["torch_operations"]:
        return f"{engines}, nothing stays in PyTorch"
    return (
        f"{engines}, {report['torch_operations']} operations stay in PyTorch ({report['switches']} switches): "
        f"{enumerated(report['torch_lines'])}"
    )
