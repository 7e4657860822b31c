"""ONNX files that are damaged in their bytes or in their structure, given to `profile`, bundles and the linter.

A file must be answered or refused in a short error. A child process opens them first, as every file of others, and is
started again where a file crashes it; this process must never crash. Latencies are not measured: a file that runs in
ONNX Runtime with every batch counts as answered.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.reliability.tally import Tally, refusal_of
from passdeploy.export import bundle as bundle_module
from passdeploy.export.lint import lint_file
from passdeploy.profiling import profile_files as profile_module
from passdeploy.runtime.onnx_examiner import OnnxExaminer

GOAL = 5_000
_LIMIT_S = 20.0  # of one file


def measure(count: int = GOAL, seed: int = 0) -> Tally:
    """Try `count` broken files, each in one of the three places that read such files."""
    tally = Tally()
    with TemporaryDirectory() as temporary, _one_examiner() as examiner:
        folder = Path(temporary)
        seeds = _whole_files()
        uses: tuple[Callable[[Path], object], ...] = (
            lambda path: profile_module.profile_files([path], threads=1, image_size=8),
            lambda path: lint_file(path, "fp16"),
            lambda path: bundle_module._examine([path]),
        )
        for number in range(count):
            chance = random.Random(f"{seed} {number}")
            path = folder / "model.onnx"
            path.write_bytes(broken(chance.choice(seeds), chance))
            outcome, problem = refusal_of(partial(uses[number % 3], path))
            tally.add(outcome, problem, trial=f"seed {seed}, number {number}")
        tally.facts = {"crashes_of_the_child": examiner.crashes}
    return tally


class _Examiner(OnnxExaminer):
    """The examiner of all files, which is not closed after each, and counts how often its process crashed."""

    crashes = 0

    def __exit__(self, *_: object) -> None:
        return

    def close(self) -> None:
        self.crashes += self._process is not None and self._process.has_ended
        super().close()


@contextmanager
def _one_examiner() -> Iterator[_Examiner]:
    examiner = _Examiner(limit_s=_LIMIT_S, memory_bytes=4 << 30)
    with (
        patch.object(profile_module, "OnnxExaminer", lambda **_: examiner),
        patch.object(bundle_module, "OnnxExaminer", lambda: examiner),
        patch.object(profile_module, "profile_pair", lambda *_, **__: None),
    ):
        yield examiner
    examiner.close()


def _whole_files() -> list[onnx.ModelProto]:
    """Make small graphs with convolutions, reshapes, control flow, quantisation and functions."""
    files = [_convolutions(), _quantised(), _branches()]
    for model in files:
        onnx.checker.check_model(model)
    return files


def _convolutions() -> onnx.ModelProto:
    weights = [
        numpy_helper.from_array(random_array((4, 3, 3, 3)), "w"),
        numpy_helper.from_array(random_array((4,)), "b"),
        numpy_helper.from_array(random_array((4, 5)), "v"),
    ]
    nodes = [
        helper.make_node("Conv", ["images", "w", "b"], ["c"], pads=[1, 1, 1, 1], strides=[1, 1]),
        helper.make_node("BatchNormalization", ["c", "b", "b", "b", "b1"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["m"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "v"], ["logits"]),
    ]
    weights.append(numpy_helper.from_array(abs(random_array((4,))) + 1, "b1"))
    return _model(nodes, weights, ["N", 3, 8, 8], ["N", 5])


def _quantised() -> onnx.ModelProto:
    scale = numpy_helper.from_array(random_array((1,))[0] * 0 + 0.1, "s")
    zero = helper.make_tensor("z", TensorProto.INT8, [], [0])
    weights = [scale, zero, numpy_helper.from_array(random_array((4, 3, 1, 1)), "w")]
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["wq"]),
        helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["wd"]),
        helper.make_node("Conv", ["d", "wd"], ["logits"]),
    ]
    return _model(nodes, weights, [1, 3, "H", "H"], [1, 4, "H", "H"])


def _branches() -> onnx.ModelProto:
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [0, -1])
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])
    value = helper.make_tensor_value_info
    then = helper.make_graph(
        [helper.make_node("Relu", ["images"], ["y"])], "then", [], [value("y", TensorProto.FLOAT, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["images"], ["w"])], "other", [], [value("w", TensorProto.FLOAT, None)]
    )
    nodes = [
        helper.make_node("ReduceMax", ["images"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["is_positive"]),
        helper.make_node("If", ["is_positive"], ["chosen"], then_branch=then, else_branch=other),
        helper.make_node("Reshape", ["chosen", "shape"], ["logits"]),
    ]
    return _model(nodes, [shape, zero], [2, 3, 8, 8], [2, 192])


def _model(nodes: list[Any], weights: list[Any], inputs: list[Any], outputs: list[Any]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, outputs)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"batch": "[1, 2, 4]"})
    return model


def random_array(shape: tuple[int, ...]) -> Any:
    import numpy as np

    return np.random.default_rng(0).normal(size=shape).astype("float32")


# How a file is broken.

_NUMBERS = (0, 1, -1, 2, 7, 255, 2**31 - 1, -(2**31), 2**40, 2**63 - 1, -(2**63))
_NAMES = ("", "images", "logits", "c", "x" * 5000, "../../x", "\x00", "n\nn", "<script>", "💥", "%s%s%n")
_OPERATORS = (
    "Loop",
    "Scan",
    "Resize",
    "Gather",
    "ConstantOfShape",
    "Tile",
    "Expand",
    "LSTM",
    "NoSuchOp",
    "",
    "If",
    "Pad",
)


def broken(model: onnx.ModelProto, chance: random.Random) -> bytes:
    """Break a graph in its structure, then perhaps in its bytes."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for _ in range(chance.randint(1, 4)):
        message, field = _random_field(changed, chance)
        _change(message, field, chance)
    content = changed.SerializeToString()
    if chance.random() < 0.3:
        content = _break_bytes(content, chance)
    return content


def _random_field(model: Any, chance: random.Random) -> tuple[Any, Any]:
    """Walk down from the model to a field that is set, chosen anew at every level."""
    message = model
    while True:
        field, value = chance.choice(message.ListFields() or [(None, None)])
        if field is None:
            return message, chance.choice(message.DESCRIPTOR.fields)
        if field.type != field.TYPE_MESSAGE or chance.random() < 0.1:
            return message, field
        message = chance.choice(list(value)) if hasattr(value, "__len__") else value


def _change(message: Any, field: Any, chance: random.Random) -> None:
    """Set a field to something else; values that it does not take are left alone."""
    value = getattr(message, field.name)
    is_many = hasattr(value, "append") or hasattr(value, "add")
    try:
        if field.type == field.TYPE_MESSAGE and is_many:
            _change_list(value, chance)
        elif is_many:
            chance.choice((value.append, lambda one: value.insert(0, one), lambda one: _set_first(value, one)))(
                _value_for(field, chance)
            )
        elif field.type == field.TYPE_MESSAGE or chance.random() < 0.1:
            message.ClearField(field.name)
        else:
            setattr(message, field.name, _value_for(field, chance))
    except (ValueError, TypeError, IndexError, OverflowError):
        return


def _change_list(value: Any, chance: random.Random) -> None:
    one, other = chance.randrange(len(value)), chance.randrange(len(value))
    how = chance.randrange(3)
    if how == 0:
        del value[one]
    elif how == 1:
        value.add().CopyFrom(value[one])
    else:
        copy = type(value[one])()
        copy.CopyFrom(value[one])
        value[one].CopyFrom(value[other])
        value[other].CopyFrom(copy)


def _set_first(value: Any, one: Any) -> None:
    value[0] = one


def _value_for(field: Any, chance: random.Random) -> Any:
    if field.type in (field.TYPE_STRING,):
        return chance.choice(_OPERATORS if field.name == "op_type" else _NAMES)
    if field.type == field.TYPE_BYTES:
        return chance.randbytes(chance.choice((0, 1, 3, 64, 4096)))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return chance.choice((0.0, -1.0, 1e38, float("nan"), float("inf")))
    return chance.choice(_NUMBERS) if chance.random() < 0.7 else chance.randrange(30)


def _break_bytes(content: bytes, chance: random.Random) -> bytes:
    how = chance.randrange(4)
    if how == 0:
        return content[: chance.randrange(len(content) + 1)]
    changed = bytearray(content or b"\0")
    for _ in range(chance.choice((1, 4, 32))):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    if how == 1:
        at = chance.randrange(len(changed))
        changed[at:at] = chance.randbytes(chance.choice((1, 8, 200)))
    return bytes(changed)
