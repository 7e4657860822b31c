"""Cast a network's exported graph to fp16 or bf16 for Torch-TensorRT, by the rule that casts our ONNX graphs.

Torch-TensorRT builds strongly typed, so the types of the graph are those of the engine. As in casting.py, batch norms
are folded and constants computed in float32, everything is cast but nodes with numbers beyond the range of the type and
layers that are kept, and inputs and outputs are float32. Torch-TensorRT's own autocast is not used: it fails for
transformers with an open batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from passdeploy.export.precision import LARGEST_FINITE, nonzero
from passdeploy.export.torch_trt_lowering import (
    LoweredGraph,
    LoweringInterpreter,
    is_operator,
    operator_name,
    weight_of,
)

CAST_TYPES: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
_aten = torch.ops.aten
_BATCH_NORMS = {_aten.batch_norm.default: 7, _aten._native_batch_norm_legit_no_training.default: 6}  # -> index of eps
_CONVOLUTIONS = (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default)
# Operators that only move values: keeping one in float32 gains no accuracy.
_DATA_MOVEMENT = frozenset(
    """
    cat chunk clone constant_pad_nd contiguous expand flatten index pad permute repeat reshape roll select slice split
    split_with_sizes squeeze stack t transpose unbind unflatten unsqueeze view _unsafe_view
    """.split()  # noqa: SIM905
)


# Operators that keep a divisor away from zero by a number; those of norms are computed in float32 inside of them.
_GUARDS = frozenset(("add", "clamp", "clamp_min", "rsub", "sub"))


class CastGraph(LoweredGraph):
    """A lowered graph that computes in fp16 or bf16, with float32 inputs and outputs.

    Args:
        graph: of `prepare_for_casting`; not changed.
        precision: fp16 or bf16.
        keep: names of nodes that stay float32, beside those with numbers beyond the range of the type.
        is_emulated: compute in float32 and round each value where it is stored, which shows on a CPU what the cast
            graph does; sums inside an operator stay float32, as on a GPU.
    """

    def __init__(
        self, graph: GraphModule, precision: str, *, keep: Collection[str] = (), is_emulated: bool = False
    ) -> None:
        self.precision, self.dtype, self.is_emulated = precision, CAST_TYPES[precision], is_emulated
        self.kept = frozenset(keep) | _nodes_beyond_range(graph, LARGEST_FINITE[precision])
        super().__init__(
            _with_cast_weights(graph, precision, self.kept, dtype=torch.float32 if is_emulated else self.dtype)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs for a batch of images, (batch, 3, height, width)."""
        outputs: Tensor = pytree.tree_map_only(Tensor, _to_float32, super().forward(images))
        return outputs

    def _interpreter(self) -> Interpreter:
        return _CastingInterpreter(self)


class _CastingInterpreter(LoweringInterpreter):
    """Runs a graph with every operator in its precision."""

    def __init__(self, cast: CastGraph) -> None:
        super().__init__(cast.body)
        self._cast, self._is_kept, self._is_guard = cast, False, False

    def run_node(self, n: Node) -> Any:
        """Run a node, after noting whether it is kept in float32, and whether its numbers must not become zero."""
        self._is_kept = n.name in self._cast.kept
        self._is_guard = not self._is_kept and operator_name(n) in _GUARDS
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator with its float arguments in the type that it computes in."""
        low, is_emulated = self._cast.dtype, self._cast.is_emulated
        is_rounded = is_emulated and not self._is_kept
        computed = torch.float32 if self._is_kept or is_emulated else low

        def convert(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dtype in (torch.float32, low):
                return _cast(_cast(value, low) if is_rounded else value, computed)
            if self._is_guard and isinstance(value, float):
                return nonzero(value, self._cast.precision)
            return computed if value is torch.float32 else value

        args, kwargs = pytree.tree_map(convert, (args, kwargs))
        result = super().call_function(target, args, kwargs)
        return pytree.tree_map(convert, result) if is_rounded else result


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a type; a cast to its own would become an operator of the exported graph."""
    return value if value.dtype == dtype else value.to(dtype)


def prepare_for_casting(graph: GraphModule) -> GraphModule:
    """Copy a functional graph with constants computed and batch norms folded, all in float32.

    A batch norm behind a convolution that nothing else reads goes into its weights, any other becomes a scale and a
    shift of its channels.
    """
    prepared = GraphModule(graph, copy.deepcopy(graph.graph))
    with torch.no_grad():
        _compute_constants_(prepared)
        _fold_batch_norms_(prepared)
    prepared.graph.eliminate_dead_code()
    prepared.recompile()
    return prepared


def castable_layers(graph: GraphModule) -> tuple[str, ...]:
    """Names of the nodes that compute with floats, in the order of the graph."""
    return tuple(
        node.name
        for node in graph.graph.nodes
        if is_operator(node) and operator_name(node) not in _DATA_MOVEMENT and _returns_floats(node)
    )


def _returns_floats(node: Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(value, Tensor) and value.dtype == torch.float32 for value in values)


def _to_float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _nodes_beyond_range(graph: GraphModule, limit: float) -> frozenset[str]:
    """Names of the nodes with a weight or a finite number that is larger than `limit`."""
    too_large: set[str] = set()
    for node in graph.graph.nodes:
        weight = weight_of(graph, node)
        if weight is not None and _largest_finite(weight) > limit:
            too_large.update(user.name for user in node.users)
        numbers = pytree.tree_leaves((node.args, node.kwargs)) if node.op == "call_function" else ()
        if any(isinstance(number, float) and limit < abs(number) < math.inf for number in numbers):
            too_large.add(node.name)
    return frozenset(too_large)


def _largest_finite(weight: Tensor) -> float:
    """Return the largest finite magnitude in a tensor of floats, 0 for any other."""
    if not weight.is_floating_point() or not weight.numel():
        return 0.0
    return float(weight.nan_to_num(0.0, 0.0, 0.0).abs().max())


def _with_cast_weights(graph: GraphModule, precision: str, kept: Collection[str], *, dtype: torch.dtype) -> GraphModule:
    """Copy a graph with float32 weights in `dtype`, where no kept node reads them; single numbers stay nonzero."""
    nodes = copy.deepcopy(graph.graph)
    weights: dict[str, Any] = {}
    for node in nodes.nodes:
        weight = weight_of(graph, node)
        if node.op == "get_attr" and weight is not None:
            if weight.dtype == torch.float32 and not any(user.name in kept for user in node.users):
                if weight.numel() == 1:
                    weight = torch.full_like(weight, nonzero(float(weight), precision))
                weight, node.target = weight.to(dtype), f"{node.target}_cast".replace(".", "_")
            weights[str(node.target)] = weight
        elif node.op in ("get_attr", "call_module"):
            weights[str(node.target)] = graph.get_submodule(str(node.target))
    return GraphModule(weights, nodes)


def _compute_constants_(graph: GraphModule) -> None:
    """Replace whatever does not depend on the images by its value."""
    values: dict[Node, Any] = {}
    for node in list(graph.graph.nodes):
        weight = weight_of(graph, node)
        if weight is not None:
            values[node] = weight
        elif node.op == "call_function" and _is_constant(node, values):
            arguments = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*arguments[0], **arguments[1])
    for node, value in values.items():
        if node.op == "call_function" and isinstance(value, Tensor) and any(user not in values for user in node.users):
            node.replace_all_uses_with(_add_weight_(graph, node, f"_constant_{node.name}", value))


def _is_constant(node: Node, known: Collection[Node]) -> bool:
    """Test whether a node computes the same from known values every time."""
    tags = getattr(node.target, "tags", ())
    return all(each in known for each in node.all_input_nodes) and torch.Tag.nondeterministic_seeded not in tags


def _add_weight_(graph: GraphModule, before: Node, name: str, value: Tensor) -> Node:
    """Add a buffer to the module, and before a node one that reads it."""
    graph.register_buffer(name, value.contiguous())
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(name)


def _fold_batch_norms_(graph: GraphModule) -> None:
    """Fold batch norms into the convolutions before them, or write them as scale and shift."""
    for norm in list(graph.graph.nodes):
        if norm.target not in _BATCH_NORMS:
            continue
        inputs, eps = norm.args[0], norm.args[_BATCH_NORMS[norm.target]]
        weight, bias, mean, variance = (weight_of(graph, each) for each in norm.args[1:5])
        if mean is None or variance is None:
            continue
        scale = (variance.double() + eps).rsqrt() * (1 if weight is None else weight.double())
        shift = (0 if bias is None else bias.double()) - mean.double() * scale
        result = _folded_convolution(graph, inputs, norm, scale, shift)
        if result is None:
            shape = (1, -1) + (1,) * (inputs.meta["val"].ndim - 2)
            factor = _add_weight_(graph, norm, f"_scale_{norm.name}", scale.float().view(shape))
            addend = _add_weight_(graph, norm, f"_shift_{norm.name}", shift.float().view(shape))
            with graph.graph.inserting_before(norm):
                product = graph.graph.call_function(_aten.mul.Tensor, (inputs, factor))
                result = graph.graph.call_function(_aten.add.Tensor, (product, addend))
            for each in (product, result):
                each.meta = {**norm.meta, "val": inputs.meta["val"]}
        is_whole = norm.target is _aten.batch_norm.default
        for output in (norm,) if is_whole else [user for user in norm.users if user.args[1] == 0]:
            output.replace_all_uses_with(result)


def _folded_convolution(graph: GraphModule, convolution: Node, norm: Node, scale: Tensor, shift: Tensor) -> Node | None:
    """Scale and shift a convolution by its weights, and return it; None where it cannot be."""
    if convolution.target not in _CONVOLUTIONS or len(convolution.users) != 1:
        return None
    kernel = weight_of(graph, convolution.args[1])
    bias_node = convolution.args[2] if len(convolution.args) > 2 else None
    bias = weight_of(graph, bias_node)
    if kernel is None or (bias is None and bias_node is not None):
        return None
    kernel = kernel.double() * scale.view(-1, *(1,) * (kernel.ndim - 1))
    bias = shift if bias is None else shift + bias.double() * scale
    weights = [
        _add_weight_(graph, convolution, f"_{name}_{norm.name}", value.float())
        for name, value in (("kernel", kernel), ("bias", bias))
    ]
    convolution.args = (convolution.args[0], *weights, *convolution.args[3:])
    return convolution
