"""ONNX Runtime's profiler: run a network under it and read the times of its kernels from the JSON file it writes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor

from passdeploy.errors import MissingError
from passdeploy.profiling.clock import Clock, HostClock
from passdeploy.profiling.kernel_times import SKIPPED_CALLS, NodeTime, Shape, typical_time
from passdeploy.profiling.runners import OrtRunner

if TYPE_CHECKING:
    from onnx import ModelProto

_KERNEL = "_kernel_time"  # the end of an event's name; the rest of it names the node


def profile_kernels(
    source: Path | ModelProto,
    *inputs: Tensor,
    threads: int,
    fewest_calls: int = 1,
    seconds: float = 0.0,
    clock: Clock | None = None,
) -> list[dict[str, Any]]:
    """Run a network under ONNX Runtime's profiler on the CPU.

    Args:
        source: the ONNX file, or the graph in memory.
        inputs: the batch, shape (batch, 3, height, width), and other inputs where the file has some.
        threads: of ONNX Runtime.
        fewest_calls: at least this many calls are profiled.
        seconds: at least this long.
        clock: another source of time, for tests.

    Returns:
        The profiler's events of kernels, in the order of execution: one per kernel and call.

    Raises:
        MissingError: the folder for temporary files has no room for the trace.
    """
    clock = clock or HostClock()
    with TemporaryDirectory() as folder:
        runner = OrtRunner("traced", source, threads=threads, profile_to=Path(folder) / "trace")
        runner.prepare(*inputs)
        began, calls = clock.now(), 0
        while calls < fewest_calls or clock.now() - began < seconds:
            runner.run()
            calls += 1
        trace = Path(runner.session.end_profiling())
        try:
            events = json.loads(trace.read_text())
        except (OSError, ValueError) as error:  # ONNX Runtime does not say that it could not write it
            raise MissingError(
                f"ONNX Runtime could not write its trace to {trace.parent}: it is not whole.\n"
                "Make room there, or name another folder: TMPDIR."
            ) from error
    return [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_KERNEL)]


def node_times(events: Sequence[dict[str, Any]]) -> tuple[NodeTime, ...]:
    """Summarise the events of `profile_kernels`: one entry per node, in the order of a call, with its typical time."""
    events_of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        events_of[event["name"].removesuffix(_KERNEL)].append(event)
    nodes = []
    for name, calls in events_of.items():
        read, written = (tuple(_event_shapes(calls[-1]["args"][f"{end}_type_shape"])) for end in ("input", "output"))
        microseconds = [float(call["dur"]) for call in calls[SKIPPED_CALLS:] or calls]
        kind = calls[-1]["args"]["op_name"]
        nodes.append(NodeTime(name, kind, (*read, *written), len(read), typical_time(microseconds) / 1e3))
    return tuple(nodes)


def _event_shapes(entries: list[dict[str, list[int]]]) -> Iterator[Shape]:
    """Yield the shape of each tensor of an event; an entry is {element type: sizes}."""
    for entry in entries:
        yield tuple(next(iter(entry.values()), ()))
