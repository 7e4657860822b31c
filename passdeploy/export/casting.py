"""From a float32 ONNX graph to one that computes in fp16 or bf16, with float32 inputs and outputs.

The graph is cast, not the module, because there the batch norms are already folded in float32: a running
variance below 6e-8 would be zero in fp16. Each node asks its operator's schema which of its inputs may have
the narrow type; a node that cannot have it, or that is to be kept, gets casts around it. `emulate_rounding` is the
other way: a float32 graph that rounds like the narrow one, to judge it where no runtime has such kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from passdeploy.errors import ExportError

ELEMENT_TYPES: Mapping[str, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_SCHEMA_TYPES = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}
_LARGEST_FINITE = {"fp16": 65504.0, "bf16": 3.3895e38}
_FLOAT = int(TensorProto.FLOAT)
# They move numbers or make them, so casting them costs no accuracy by itself.
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
    """A copy of `model` whose nodes compute in `precision`, all but those named in `keep`.

    Nodes whose weights do not fit into the narrow type are kept too.

    Raises:
        ExportError: the graph has control flow (a branch or a loop), which is not cast.
    """
    for node in model.graph.node:
        if any(attribute.type == AttributeProto.GRAPH for attribute in node.attribute):
            raise ExportError(
                f"the graph has control flow ({node.op_type} {node.name!r}), which cannot be cast to {precision}.\n"
                "Take the branch or loop out of the model's forward, or export fp32."
            )
    return _Caster(model, precision, keep).run()


def castable_nodes(model: ModelProto, precision: str) -> tuple[str, ...]:
    """The nodes that compute in float and could do so in `precision`, by name, in the order of the graph."""
    caster = _Caster(model, precision, ())
    return tuple(node.name for node in model.graph.node if node.op_type not in DATA_MOVEMENT_OPS and caster.is_castable(node))


class _Caster:
    """One pass over a graph; every float value has a wide version, a narrow one, or both."""

    def __init__(self, model: ModelProto, precision: str, keep: Collection[str]) -> None:
        self.model, self.precision = model, precision
        self.narrow = ELEMENT_TYPES[precision]
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.floats = {name for name, kind in types_of(model).items() if kind == _FLOAT}
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == _FLOAT}
        self.outputs = {value.name for value in model.graph.output}
        limit = _LARGEST_FINITE[precision]
        too_large = {name for name, tensor in self.weights.items() if _largest_magnitude(tensor) > limit}
        self.kept = {*keep, *(node.name for node in model.graph.node if too_large & set(node.input))}
        self.versions: dict[tuple[str, int], str] = {}  # (value, element type) -> its name in the new graph
        self.used_names: set[str] = set()
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def run(self) -> ModelProto:
        """The new graph."""
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
        """Whether the node computes in the narrow type: it has floats, and its operator allows it for all of them."""
        if node.name in self.kept or (node.op_type == "Constant" and not _has_tensor(node)):
            return False
        narrow = _SCHEMA_TYPES[self.precision]
        bound = [kind for name, kind in _allowed_types(node, self.opsets) if name in self.floats]
        return any(kind != "tensor(float)" for kind in bound) and all(
            kind == "tensor(float)" or narrow in kind for kind in bound
        )

    def _cast_node(self, node: NodeProto) -> None:
        is_castable = self.is_castable(node)
        fixed = {name for name, kind in _allowed_types(node, self.opsets) if kind == "tensor(float)"}
        copy = NodeProto()
        copy.CopyFrom(node)
        for index, name in enumerate(node.input):
            if name in self.floats:
                copy.input[index] = self._value_as(name, self.narrow if is_castable and name not in fixed else _FLOAT)
        for index, name in enumerate(node.output):
            if name in self.floats:
                kind = self.narrow if is_castable and name not in fixed else _FLOAT
                copy.output[index] = f"{name}_{self.precision}" if name in self.outputs and kind != _FLOAT else name
                self._record_version(name, kind, copy.output[index])
        if is_castable:
            _retype_attributes(copy, _FLOAT, self.narrow)
        self.nodes.append(copy)

    def _value_as(self, name: str, kind: int) -> str:
        """The name of the value in that type; made where it does not exist yet."""
        if (name, kind) not in self.versions:
            made = name if name not in self.used_names else f"{name}_{'fp32' if kind == _FLOAT else self.precision}"
            if name in self.weights:
                tensor = _convert_tensor(self.weights[name], kind)
                tensor.name = made
                self.initializers.append(tensor)
            else:
                source = self.versions[name, self.narrow if kind == _FLOAT else _FLOAT]
                self.nodes.append(helper.make_node("Cast", [source], [made], name=f"cast_{made}", to=kind))
            self._record_version(name, kind, made)
        return self.versions[name, kind]

    def _record_version(self, name: str, kind: int, made: str) -> None:
        self.versions[name, kind] = made
        self.used_names.add(made)


def emulate_rounding(model: ModelProto) -> ModelProto:
    """A float32 graph that computes what a graph in fp16 or bf16 does: every value is rounded where it is stored.

    Sums inside an operator stay float32, as they do on a GPU. A value beyond the narrow type becomes infinite,
    which ONNX Runtime on a CPU would hide: it computes chains of fp16 operators in float32.
    """
    narrow = set(ELEMENT_TYPES.values())
    types = types_of(model)
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for tensor in graph.initializer:
        if tensor.data_type in narrow:
            tensor.CopyFrom(_convert_tensor(tensor, _FLOAT))
    nodes: list[NodeProto] = []
    for node in graph.node:
        stored = {name: types[name] for name in node.output if types.get(name) in narrow}
        for kind in narrow:
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
    """Element type of every value: inputs, weights, and what each node puts out."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values: Iterable[onnx.ValueInfoProto] = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: int(value.type.tensor_type.elem_type) for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def find_opset(model: ModelProto) -> int | None:
    """The version of ONNX's own operator set that the model is written in."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)


def _allowed_types(node: NodeProto, opsets: dict[str, int]) -> list[tuple[str, str]]:
    """Value name and what its operator allows there: one type, or all of those of a type variable."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:  # an operator from elsewhere: it stays as it is
        return [(name, "tensor(float)") for name in (*node.input, *node.output)]
    variables = {one.type_param_str: " ".join(one.allowed_type_strs) for one in schema.type_constraints}
    pairs = []
    for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, name in enumerate(names):
            kind = formal[min(index, len(formal) - 1)].type_str
            pairs.append((name, variables.get(kind, kind)))
    return pairs


def _replace_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    """Put `nodes`, some of which may be the graph's own, in the place of the graph's."""
    replacement = GraphProto()
    replacement.node.extend(nodes)
    graph.node.clear()
    graph.node.extend(replacement.node)


def _has_tensor(node: NodeProto) -> bool:
    return any(attribute.type == AttributeProto.TENSOR for attribute in node.attribute)


def _retype_attributes(node: NodeProto, old: int, new: int) -> None:
    """Tensors in attributes, and the types that casts and generators name."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR and attribute.t.data_type == old:
            attribute.t.CopyFrom(_convert_tensor(attribute.t, new))
        elif attribute.name in ("to", "dtype") and attribute.i == old:
            attribute.i = new


def _convert_tensor(tensor: TensorProto, kind: int) -> TensorProto:
    """A copy with the numbers in another element type, rounded to the nearest."""
    if tensor.data_type == kind:
        same = TensorProto()
        same.CopyFrom(tensor)
        return same
    with np.errstate(over="ignore"):
        numbers = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
    return numpy_helper.from_array(numbers, tensor.name)


def _largest_magnitude(tensor: TensorProto) -> float:
    numbers = numpy_helper.to_array(tensor)
    return float(np.abs(numbers).max()) if numbers.size else 0.0
