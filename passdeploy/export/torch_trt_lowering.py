"""Operators of an exported graph that Torch-TensorRT does not take as they are, in terms of those that it takes.

With an open batch some operators decompose into one that splits the network: the mean before a classifier, for
example, ends in `as_strided` where its input is channels-last. They are replaced before Torch-TensorRT sees the graph,
by `LoweredGraph`, which runs the graph operator by operator and is exported again. The result is the same on the CPU:
`largest_difference` compares it with the network.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, traceback

from passdeploy.errors import ExportError
from passdeploy.export.artifact import BatchRange
from passdeploy.export.parity import errors_between

LARGEST_DIFFERENCE = 1e-5  # of the lowered float32 graph from its network, relative to the largest output
_aten = torch.ops.aten


def _adaptive_average(x: Tensor, size: Sequence[int]) -> Tensor:
    """Average over whole images by their mean, which keeps no memory format."""
    if list(size) == [1, 1]:
        return x.mean((-2, -1), keepdim=True)
    pooled: Tensor = _aten.adaptive_avg_pool2d.default(x, size)
    return pooled


def _max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Tensor:
    """Pool with `ceil_mode` off: the image gets rows and columns that are never the largest instead."""
    more = _ceil_padding(x, kernel, stride, padding, dilation) if ceil_mode else (0, 0)
    if any(more):
        x = nn.functional.pad(x, _pad_widths(padding, more), value=torch.finfo(x.dtype).min)
        padding = (0, 0)
    pooled: Tensor = _aten.max_pool2d.default(x, kernel, stride, padding, dilation)
    return pooled


def _average_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Tensor:
    """Pool with `ceil_mode` off: the image gets zeros instead, and the averages over them are scaled."""
    more = _ceil_padding(x, kernel, stride, padding, (1, 1)) if ceil_mode else (0, 0)
    if not any(more):
        pooled: Tensor = _aten.avg_pool2d.default(x, kernel, stride, padding, False, count_include_pad, divisor)
        return pooled
    pads = _pad_widths(padding, more)
    ones = torch.ones(1, 1, *x.shape[2:], device=x.device)
    asked = _aten.avg_pool2d.default(ones, kernel, stride, padding, True, count_include_pad, divisor)
    ratio = asked / _aten.avg_pool2d.default(nn.functional.pad(ones, pads), kernel, stride)
    padded: Tensor = _aten.avg_pool2d.default(nn.functional.pad(x, pads), kernel, stride)
    scaled: Tensor = padded * ratio.to(x.dtype)
    return scaled


def _ceil_padding(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Return the rows and columns that an image lacks so that `ceil_mode` changes nothing."""
    lacking = []
    for axis, size in enumerate(x.shape[2:]):
        step, span = _at(stride, axis) or _at(kernel, axis), (_at(kernel, axis) - 1) * _at(dilation, axis) + 1
        before = _at(padding, axis)
        windows = -(-(size + 2 * before - span) // step) + 1
        if (windows - 1) * step >= size + before:  # the last window would start in the padding
            windows -= 1
        lacking.append(max(0, (windows - 1) * step + span - size - 2 * before))
    return tuple(lacking)


def _pad_widths(padding: Sequence[int], more: Sequence[int]) -> list[int]:
    """Return the widths for `pad`: left, right, top, bottom."""
    rows, columns = _at(padding, 0), _at(padding, 1)
    return [columns, columns + more[1], rows, rows + more[0]]


def _at(numbers: Sequence[int], axis: int) -> int:
    """Return the number for an axis from a list of one for each or one for all; 0 from an empty list."""
    return numbers[axis if len(numbers) > 1 else 0] if len(numbers) else 0


def _clamp(x: Tensor, smallest: float = -1.0, largest: float = 1.0) -> Tensor:
    clamped: Tensor = _aten.clamp.default(x, smallest, largest)
    return clamped


def _hard_sigmoid(x: Tensor) -> Tensor:
    return _clamp(x + 3, 0, 6) / 6


def _fold(
    x: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    """Add up overlapping blocks by a transposed convolution whose weights put each number into its place."""
    counts, more = [], []
    for axis in (0, 1):
        span = dilation[axis] * (kernel[axis] - 1) + 1
        counts.append((size[axis] + 2 * padding[axis] - span) // stride[axis] + 1)
        more.append(size[axis] + 2 * padding[axis] - span - (counts[axis] - 1) * stride[axis])
    places = kernel[0] * kernel[1]
    channels = x.shape[1] // places
    one = torch.eye(places, dtype=x.dtype, device=x.device).view(places, 1, *kernel).repeat(channels, 1, 1, 1)
    blocks = x.reshape(x.shape[0], x.shape[1], *counts)
    return nn.functional.conv_transpose2d(blocks, one, None, stride, padding, more, channels, dilation)


def _variance_and_mean(
    x: Tensor, dims: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the variance from the differences to the mean, in float32, as PyTorch does."""
    exact = x if x.dtype == torch.float32 else x.float()
    axes = tuple(dims or range(x.ndim))
    mean = exact.mean(axes, keepdim=True)
    count = math.prod(x.shape[axis] for axis in axes) - (1 if correction is None else correction)
    variance = ((exact - mean) * (exact - mean)).sum(axes, keepdim=True) / count
    results = [each if keepdim else each.squeeze(axes) for each in (variance, mean)]
    variance, mean = (each if each.dtype == x.dtype else each.to(x.dtype) for each in results)
    return variance, mean


def _variance(x: Tensor, dims: Sequence[int] | None, is_unbiased: bool = True, keepdim: bool = False) -> Tensor:
    return _variance_and_mean(x, dims, correction=int(is_unbiased), keepdim=keepdim)[0]


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Divide by the root mean square over the last dimensions, which is computed in float32, as PyTorch does."""
    exact = x if x.dtype == torch.float32 else x.float()
    dims = tuple(range(-len(shape), 0))
    smallest = torch.finfo(torch.float32).eps if eps is None else eps
    normed = exact * ((exact * exact).mean(dims, keepdim=True) + smallest).rsqrt()
    if normed.dtype != x.dtype:
        normed = normed.to(x.dtype)
    return normed if weight is None else normed * weight


# PyTorch's decompositions of activations compute in float32 and cast back, which would put two casts of an fp16 graph
# between a convolution and the activation that TensorRT fuses with it.
REPLACEMENTS: Mapping[Any, Callable[..., Any]] = {
    # These decompose into operators that TensorRT does not have.
    _aten.rms_norm.default: _rms_norm,
    _aten.col2im.default: _fold,
    _aten.var.dim: _variance,
    _aten.var.correction: lambda x, dims=None, **options: _variance_and_mean(x, dims, **options)[0],
    _aten.var_mean.correction: _variance_and_mean,
    _aten.std.dim: lambda x, *arguments: _variance(x, *arguments).sqrt(),
    _aten.std.correction: lambda x, dims=None, **options: _variance_and_mean(x, dims, **options)[0].sqrt(),
    _aten.hardtanh.default: _clamp,
    _aten.relu6.default: lambda x: _clamp(x, 0, 6),
    _aten.hardsigmoid.default: _hard_sigmoid,
    _aten.hardswish.default: lambda x: x * _clamp(x + 3, 0, 6) / 6,
    _aten.adaptive_avg_pool2d.default: _adaptive_average,
    _aten.max_pool2d.default: _max_pool,
    _aten.avg_pool2d.default: _average_pool,
}


class LoweredGraph(nn.Module):
    """A graph that runs its operators one by one, with those of `REPLACEMENTS` replaced.

    Args:
        graph: takes one batch of images.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.body = graph

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs for a batch of images, (batch, 3, height, width)."""
        result: Tensor = self._interpreter().run(images)
        return result

    def _interpreter(self) -> Interpreter:
        return LoweringInterpreter(self.body)


class LoweringInterpreter(Interpreter):
    """Runs a graph with the operators of `REPLACEMENTS` replaced."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator, or what replaces it."""
        return super().call_function(REPLACEMENTS.get(target, target), args, kwargs)


def export_graph(module: nn.Module, image_shape: Sequence[int], sizes: BatchRange) -> torch.export.ExportedProgram:
    """Export a module that takes images, with an open batch unless `sizes` holds one size.

    Nodes keep the source lines of the graph that the module runs, if it is a `LoweredGraph`.
    """
    dynamic = None
    if not sizes.is_fixed:
        dynamic = ({0: torch.export.Dim("batch", min=sizes.smallest, max=sizes.largest)},)
    # Tracing takes a batch of 1 for a constant.
    example = torch.zeros(sizes.typical if sizes.is_fixed else max(2, sizes.typical), *image_shape)
    with torch.no_grad(), traceback.preserve_node_meta():
        return torch.export.export(module, (example,), dynamic_shapes=dynamic, strict=False)


def functional_graph(program: torch.export.ExportedProgram) -> GraphModule:
    """Return the graph of a program without operators that work in place and without checks; the weights are shared."""
    graph: GraphModule = program.module()
    _inline_regions_(graph)
    for node in list(graph.graph.nodes):
        if operator_name(node).rstrip("_") in _DROPOUTS and node.args[2] is False:  # not in training
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    if not _replace_in_place_(graph):
        # Aliases need PyTorch's own pass, which takes longer than the export.
        graph = program.run_decompositions({}).module()
        _inline_regions_(graph)
    for node in reversed(graph.graph.nodes):
        if _is_check(node):
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _inline_regions_(graph: GraphModule) -> None:
    """Inline regions of code in which the model has switched autocast or gradients off: both are off anyway."""
    for node in list(graph.graph.nodes):
        if str(node.target) not in _REGIONS or (node.target is _WITH_AUTOCAST and node.args[2]):
            continue
        body = next(each for each in node.args if isinstance(each, Node) and each.op == "get_attr")
        inner: Any = graph.get_submodule(str(body.target))
        inputs = node.args[node.args.index(body) + 1 :]
        values = dict(zip((each for each in inner.graph.nodes if each.op == "placeholder"), inputs, strict=True))
        with graph.graph.inserting_before(node):
            result: Any = graph.graph.graph_copy(inner.graph, values)
        if isinstance(result, Node):
            node.replace_all_uses_with(result)
        else:
            for user in list(node.users):  # takes one of the results
                user.replace_all_uses_with(result[user.args[1]])
                graph.graph.erase_node(user)
        graph.graph.erase_node(node)
        if not body.users:
            graph.graph.erase_node(body)


_WITH_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")


def _replace_in_place_(graph: GraphModule) -> bool:
    """Replace operators that work in place by those that do not; False where a value may have other names."""
    seen: set[Node] = set()
    for node in list(graph.graph.nodes):
        seen.add(node)
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        changed = node.args[0]
        earlier = [user for user in changed.users if user in seen and user is not node]
        name, overload = str(node.target).removeprefix("aten.").split(".")
        functional = getattr(getattr(_aten, name.removesuffix("_"), None), overload, None)
        makes_no_alias = all(operator_name(each) in _MAKES_NEW_VALUES for each in (changed, *earlier))
        if functional is None or not name.endswith("_") or not makes_no_alias:
            return False
        node.target = functional
        changed.replace_all_uses_with(node, delete_user_cb=lambda user: user not in seen)
    return True


_DROPOUTS = ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")  # of input, probability, training
# Operators whose result shares no memory with their inputs.
_MAKES_NEW_VALUES = frozenset(
    """
    adaptive_avg_pool2d add avg_pool2d batch_norm cat conv1d conv2d conv3d conv_transpose2d div elu exp gelu group_norm
    hardsigmoid hardswish hardtanh layer_norm leaky_relu linear matmul max_pool2d mean mul relu relu6
    scaled_dot_product_attention sigmoid silu softmax sub sum tanh
    """.split()  # noqa: SIM905
)


def operator_name(node: Node) -> str:
    """Return the name of a node's operator, such as `conv2d`."""
    packet = getattr(node.target, "overloadpacket", None)  # without it, a function of Python
    return str(packet).rpartition(".")[2] if packet else str(getattr(node.target, "__name__", node.target))


def _is_check(node: Node) -> bool:
    """Test whether a node only checks types or sizes, which TensorRT's profile does too."""
    if node.users:
        return False
    names = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "_guards_fn")
    return any(name in str(node.target) for name in names)


def largest_difference(module: nn.Module, network: nn.Module, images: Tensor) -> float:
    """Return the largest difference of two modules' outputs on the CPU, relative to the largest output."""
    with torch.no_grad():
        return errors_between(module(images), network(images))[1]


def require_same(module: nn.Module, network: nn.Module, images: Tensor) -> float:
    """Return `largest_difference`, which must not exceed `LARGEST_DIFFERENCE`.

    Raises:
        ExportError: it does.
    """
    difference = largest_difference(module, network, images)
    if not difference <= LARGEST_DIFFERENCE:
        raise ExportError(
            f"the graph of {type(network).__name__} for Torch-TensorRT differs from the network by {difference:.1e} on "
            f"the CPU (limit {LARGEST_DIFFERENCE:.0e}).\n"
            "Please send the model; passdeploy export --trt builds an engine through ONNX."
        )
    return difference


def source_line(node: Node) -> str:
    """Return file and line of the model's code that a node comes from: the innermost line outside of torch."""
    frames = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    for frame in reversed(frames):
        file, _, rest = frame.removeprefix('File "').partition('", line ')
        if "/torch/" not in file:
            return f"{file.rsplit('/', 1)[-1]}:{rest.partition(',')[0]}"
    return ""


def module_of(node: Node) -> str:
    """Return the name of the innermost module that a node comes from; without one, the node's own."""
    modules = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values() if name]
    return str(modules[-1]) if modules else node.name


def is_operator(node: Node) -> bool:
    """Test whether a node computes something: it is no input, weight, output or choice of one of several results."""
    return node.op in ("call_function", "call_method") and node.target is not operator.getitem


def weight_of(graph: GraphModule, node: Any) -> Tensor | None:
    """Return the tensor that a node reads from the module, or None."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, Tensor) else None
