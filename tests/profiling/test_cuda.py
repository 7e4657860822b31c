"""CUDA graphs and GPU memory, with a fake GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from passdeploy.errors import UsageError
from passdeploy.profiling import cuda
from passdeploy.profiling.cuda import capture_graph, measure_gpu_memory


class Graph:
    """A fake CUDA graph that counts its replays."""

    def __init__(self) -> None:
        self.replayed = 0
        self.stream = ""  # that it was captured on

    def replay(self) -> None:
        self.replayed += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    made: list[Graph] = []

    @contextmanager
    def capture(graph: Graph, stream: str = "one for all GPUs") -> Iterator[None]:
        graph.stream = stream
        made.append(graph)
        yield

    fake = SimpleNamespace(
        synchronize=lambda: None, CUDAGraph=Graph, graph=capture, Stream=lambda: f"of the current GPU, {len(made)}"
    )
    monkeypatch.setattr(cuda, "torch", SimpleNamespace(cuda=fake))
    return made


def test_a_call_is_captured_after_it_has_settled_and_then_only_replayed(graphs: list[Graph]):
    calls: list[int] = []
    replay = capture_graph(lambda: calls.append(len(graphs)), "it")
    assert calls == [0, 0, 0, 1]  # three before the capture, one in it
    replay()
    replay()
    assert (len(calls), graphs[0].replayed) == (4, 2)


def test_each_graph_is_captured_on_a_stream_of_the_current_gpu(graphs: list[Graph]):
    for _ in range(2):
        capture_graph(lambda: None, "it")
    assert [graph.stream for graph in graphs] == ["of the current GPU, 0", "of the current GPU, 1"]


def test_what_cannot_be_captured_is_said(graphs: list[Graph]):
    def waits() -> None:
        if graphs:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(UsageError, match=r"dense cannot be captured as a CUDA graph: operation not permitted"):
        capture_graph(waits, "dense")


def test_memory_is_what_was_allocated_at_most_or_what_the_driver_has_less(monkeypatch: pytest.MonkeyPatch):
    free = iter([1000 * 2**20, 800 * 2**20] * 2)
    fake = SimpleNamespace(
        is_available=lambda: True,
        synchronize=lambda device: None,
        reset_peak_memory_stats=lambda device: None,
        memory_allocated=lambda device: 10 * 2**20,
        max_memory_allocated=lambda device: 60 * 2**20,
        mem_get_info=lambda device: (next(free), 0),
    )
    monkeypatch.setattr(cuda, "torch", SimpleNamespace(cuda=fake))
    gpu, done = SimpleNamespace(type="cuda"), list[str]()
    assert measure_gpu_memory(gpu, lambda: done.append("torch"), by_driver=False) == 50  # type: ignore[arg-type]
    next(free)
    assert measure_gpu_memory(gpu, lambda: done.append("tensorrt"), by_driver=True) == 200  # type: ignore[arg-type]
    assert measure_gpu_memory(SimpleNamespace(type="cpu"), lambda: done.append("cpu"), by_driver=False) is None  # type: ignore[arg-type]
    assert done == ["torch", "tensorrt", "cpu"]
