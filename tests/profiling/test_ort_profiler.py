from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import ModelProto, TensorProto, helper

from passdeploy.errors import MissingError
from passdeploy.profiling.ort_profiler import node_times, profile_kernels

from .fakes import FakeClock

pytest.importorskip("onnxruntime", reason="extra cpu is not installed")
IMAGES = torch.zeros(1, 3, 4, 4)


@pytest.fixture
def negations() -> ModelProto:
    """Build a graph of two operators in a row."""
    nodes = [helper.make_node("Neg", [f"x{n}"], [f"x{n + 1}"], name=f"neg{n}") for n in range(2)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 3, 4, 4)) for name in ("x0", "x2")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_every_kernel_of_every_call_is_an_event(negations: ModelProto):
    assert len(profile_kernels(negations, IMAGES, threads=1)) == 2
    assert len(profile_kernels(negations, IMAGES, threads=1, fewest_calls=3, clock=FakeClock())) == 6


def test_calls_go_on_until_the_time_is_over(negations: ModelProto):
    class Ticking(FakeClock):
        """A clock that advances by one second whenever it is read."""

        def now(self) -> float:
            self.seconds += 1.0
            return self.seconds

    assert len(profile_kernels(negations, IMAGES, threads=1, seconds=4.0, clock=Ticking())) == 2 * 4


def test_a_trace_that_found_no_room_is_an_error(negations: ModelProto, monkeypatch: pytest.MonkeyPatch):
    whole = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: whole(path)[:-100])  # as ONNX Runtime leaves it on a full disk
    with pytest.raises(MissingError, match=r"could not write its trace to .*\n.*TMPDIR"):
        profile_kernels(negations, IMAGES, threads=1)


def event(name: str, microseconds: float) -> dict[str, Any]:
    """Make an event as ONNX Runtime writes it."""
    read, written = [{"float": [1, 3, 4, 4]}, {"float": [8, 3, 1, 1]}], [{"float": [1, 8, 4, 4]}]
    facts = {"op_name": "Conv", "input_type_shape": read, "output_type_shape": written}
    return {"name": f"{name}_kernel_time", "dur": microseconds, "args": facts}


def test_events_of_a_node_become_one_time_without_the_first_call():
    events = [event("a", 900), event("b", 7), *(event("a", 20) for _ in range(3))]
    first, second = node_times(events)
    assert (first.name, first.kind, first.ms, second.name, second.ms) == ("a", "Conv", 0.02, "b", 0.007)
    assert first.shapes == ((1, 3, 4, 4), (8, 3, 1, 1), (1, 8, 4, 4))
    assert first.inputs == 2
