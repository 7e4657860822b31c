"""Cast a float32 ONNX graph to fp16 or bf16 arithmetic, with float32 inputs and outputs.

The ONNX graph is cast, not the PyTorch module, because in the graph the batch norms are already folded in
float32: a running variance below 6e-8 would be zero in fp16. Each operator's schema states which of its inputs
may have the 16-bit type; a node that cannot have it, or that has to stay float32, gets casts around it.
`emulate_rounding` goes the other way: it makes a float32 graph that rounds like the 16-bit one, so that the
result can be checked where no runtime has kernels for the type.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from passdeploy.errors import ExportError
from passdeploy.export.precision import LARGEST_FINITE, nonzero

ELEMENT_TYPES: Mapping[str, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_SCHEMA_TYPES = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}
_FLOAT = int(TensorProto.FLOAT)
# Operators that only move values or produce constants: casting them costs no accuracy by itself.
DATA_MOVEMENT_OPS = frozenset(
    [
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Pad",
        "Reshape",
        "Shape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    ]
)


def cast_graph(model: ModelProto, precision: str, *, keep: Collection[str] = ()) -> ModelProto:
    """Copy `model` with all nodes computing in `precision`, except those named in `keep`.

    Nodes with weights beyond the range of the 16-bit type stay float32 too.

    Raises:
        ExportError: the graph has control flow (a branch or a loop), which cannot be cast.
    """
    for node in model.graph.node:
        if any(attribute.type == AttributeProto.GRAPH for attribute in node.attribute):
            raise ExportError(
                f"the graph has control flow ({node.op_type} {node.name!r}), which cannot be cast to {precision}.\n"
                "Take the branch or loop out of the model's forward, or export fp32."
            )
    return _Caster(model, precision, keep).run()


def castable_nodes(model: ModelProto, precision: str) -> tuple[str, ...]:
    """Names of the nodes that compute in float32 and could compute in `precision`, in the order of the graph."""
    caster = _Caster(model, precision, ())
    computing = (node for node in model.graph.node if node.op_type not in DATA_MOVEMENT_OPS)
    return tuple(node.name for node in computing if caster.is_castable(node))


class _Caster:
    """One casting pass over a graph; each float value gets a float32 version, a 16-bit version, or both."""

    def __init__(self, model: ModelProto, precision: str, keep: Collection[str]) -> None:
        self.model, self.precision = model, precision
        self.target_type = ELEMENT_TYPES[precision]
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.floats = {name for name, kind in types_of(model).items() if kind == _FLOAT}
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == _FLOAT}
        self.outputs = {value.name for value in model.graph.output}
        limit = LARGEST_FINITE[precision]
        too_large = {name for name, tensor in self.weights.items() if _largest_magnitude(tensor) > limit}
        self.kept = {*keep, *(node.name for node in model.graph.node if too_large & set(node.input))}
        self.versions: dict[tuple[str, int], str] = {}  # (value, element type) -> its name in the new graph
        self.used_names: set[str] = set()
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def run(self) -> ModelProto:
        """Return the cast graph."""
        graph = self.model.graph
        for value in graph.input:
            self._record_version(value.name, _FLOAT, value.name)
        for node in graph.node:
            self._cast_node(node)
        for name in self.outputs & self.floats:
            self._value_as(name, _FLOAT)
        result = ModelProto()
        result.CopyFrom(self.model)
        del result.graph.initializer[:], result.graph.value_info[:]
        _replace_nodes(result.graph, self.nodes)
        others = [tensor for tensor in graph.initializer if tensor.name not in self.weights]
        result.graph.initializer.extend([*self.initializers, *others])
        return onnx.shape_inference.infer_shapes(result)

    def is_castable(self, node: NodeProto) -> bool:
        """True if the node has float values and its operator allows the 16-bit type for all that are not fixed."""
        if node.name in self.kept or (node.op_type == "Constant" and not _has_tensor(node)):
            return False
        target = _SCHEMA_TYPES[self.precision]
        allowed = [types for name, types in _allowed_types(node, self.opsets) if name in self.floats]
        return any(types != "tensor(float)" for types in allowed) and all(
            types == "tensor(float)" or target in types for types in allowed
        )

    def _cast_node(self, node: NodeProto) -> None:
        """Append a copy of the node, in the 16-bit type where it can have it, with casts before it where needed."""
        is_castable = self.is_castable(node)
        fixed = {name for name, types in _allowed_types(node, self.opsets) if types == "tensor(float)"}
        copy = NodeProto()
        copy.CopyFrom(node)
        for index, name in enumerate(node.input):
            if name in self.floats:
                kind = self.target_type if is_castable and name not in fixed else _FLOAT
                copy.input[index] = self._value_as(name, kind)
        for index, name in enumerate(node.output):
            if name in self.floats:
                kind = self.target_type if is_castable and name not in fixed else _FLOAT
                copy.output[index] = f"{name}_{self.precision}" if name in self.outputs and kind != _FLOAT else name
                self._record_version(name, kind, copy.output[index])
        if is_castable:
            _retype_attributes(copy, _FLOAT, self.target_type, convert=self._converted)
        self.nodes.append(copy)

    def _value_as(self, name: str, kind: int) -> str:
        """Return the name of a value in an element type; add a cast or a converted weight if there is none yet."""
        if (name, kind) not in self.versions:
            suffix = "fp32" if kind == _FLOAT else self.precision
            new_name = name if name not in self.used_names else f"{name}_{suffix}"
            if name in self.weights:
                tensor = self._converted(self.weights[name], kind)
                tensor.name = new_name
                self.initializers.append(tensor)
            else:
                source = self.versions[name, self.target_type if kind == _FLOAT else _FLOAT]
                self.nodes.append(helper.make_node("Cast", [source], [new_name], name=f"cast_{new_name}", to=kind))
            self._record_version(name, kind, new_name)
        return self.versions[name, kind]

    def _converted(self, weight: TensorProto, kind: int) -> TensorProto:
        """Copy a weight to an element type; a single number, which may guard a division, is not rounded to zero."""
        if kind == self.target_type and (numbers := numpy_helper.to_array(weight)).size == 1:
            guard = np.full_like(numbers, nonzero(float(numbers.item()), self.precision))
            weight = numpy_helper.from_array(guard, weight.name)
        return _convert_tensor(weight, kind)

    def _record_version(self, name: str, kind: int, new_name: str) -> None:
        """Remember that the value `name` is called `new_name` in the element type `kind`."""
        self.versions[name, kind] = new_name
        self.used_names.add(new_name)


def emulate_rounding(model: ModelProto) -> ModelProto:
    """Make a float32 graph that computes what an fp16 or bf16 graph does, by rounding each value where it is stored.

    Sums inside an operator stay float32, as on a GPU. A value beyond the range of the 16-bit type becomes infinite;
    ONNX Runtime on a CPU would hide that, because it computes chains of fp16 operators in float32.
    """
    cast_types = set(ELEMENT_TYPES.values())
    types = types_of(model)
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for tensor in graph.initializer:
        if tensor.data_type in cast_types:
            tensor.CopyFrom(_convert_tensor(tensor, _FLOAT))
    nodes: list[NodeProto] = []
    for node in graph.node:
        stored = {name: types[name] for name in node.output if types.get(name) in cast_types}
        for kind in cast_types:
            _retype_attributes(node, kind, _FLOAT)
        for index, name in enumerate(node.output):
            if name in stored:
                node.output[index] = f"{name}_exact"
        nodes.append(node)
        for name, kind in stored.items():
            nodes.append(helper.make_node("Cast", [f"{name}_exact"], [f"{name}_stored"], to=kind))
            nodes.append(helper.make_node("Cast", [f"{name}_stored"], [name], to=_FLOAT))
    del graph.value_info[:]
    _replace_nodes(graph, nodes)
    return result


def types_of(model: ModelProto) -> dict[str, int]:
    """Map the name of every value (inputs, weights, outputs of nodes) to its element type."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values: Iterable[onnx.ValueInfoProto] = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: int(value.type.tensor_type.elem_type) for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def find_opset(model: ModelProto) -> int | None:
    """Return the version of ONNX's own operator set that the model uses."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)


def _allowed_types(node: NodeProto, opsets: dict[str, int]) -> list[tuple[str, str]]:
    """List each value of a node with the types its operator allows there: one, or several separated by spaces."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:  # a custom operator: it stays float32
        return [(name, "tensor(float)") for name in (*node.input, *node.output)]
    variables = {item.type_param_str: " ".join(item.allowed_type_strs) for item in schema.type_constraints}
    pairs = []
    for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, name in enumerate(names):
            type_name = formal[min(index, len(formal) - 1)].type_str  # a type, or a variable such as "T"
            pairs.append((name, variables.get(type_name, type_name)))
    return pairs


def _replace_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    """Replace the nodes of a graph by `nodes`, some of which may be the graph's own."""
    replacement = GraphProto()
    replacement.node.extend(nodes)
    del graph.node[:]  # older protobuf has no `clear`
    graph.node.extend(replacement.node)


def _has_tensor(node: NodeProto) -> bool:
    """True if an attribute of the node is a tensor."""
    return any(attribute.type == AttributeProto.TENSOR for attribute in node.attribute)


def _retype_attributes(
    node: NodeProto, old: int, new: int, *, convert: Callable[[TensorProto, int], TensorProto] | None = None
) -> None:
    """Replace an element type in a node's attributes: in tensors, and where Cast and generators name their type."""
    convert = convert or _convert_tensor
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR and attribute.t.data_type == old:
            attribute.t.CopyFrom(convert(attribute.t, new))
        elif attribute.name in ("to", "dtype") and attribute.i == old:
            attribute.i = new


def _convert_tensor(tensor: TensorProto, kind: int) -> TensorProto:
    """Copy a tensor to another element type, rounding to the nearest value."""
    if tensor.data_type == kind:
        same = TensorProto()
        same.CopyFrom(tensor)
        return same
    with np.errstate(over="ignore"):
        numbers = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
    return numpy_helper.from_array(numbers, tensor.name)


def _largest_magnitude(tensor: TensorProto) -> float:
    """Return the largest absolute value in a tensor, 0 for an empty one."""
    numbers = numpy_helper.to_array(tensor)
    return float(np.abs(numbers).max()) if numbers.size else 0.0
