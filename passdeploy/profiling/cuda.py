"""CUDA streams, CUDA graphs and GPU memory, as measurements on an NVIDIA GPU use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from passdeploy.errors import UsageError, first_line
from passdeploy.runtime.device_memory import is_out_of_memory

_CALLS_BEFORE_CAPTURE = 3  # libraries choose their kernels and allocate memory in the first calls


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Make a new CUDA stream the current one inside the block; do nothing on a CPU.

    A graph cannot be captured on the default stream, and TensorRT synchronises more often there.
    """
    with torch.cuda.stream(torch.cuda.Stream(device)) if _is_usable(device) else nullcontext():
        yield


def capture_graph(work: Callable[[], object], what: str) -> Callable[[], None]:
    """Capture a call as a CUDA graph on the current GPU, after three warm-up calls.

    Args:
        work: queues the call; it must use the same memory every time and must not wait for the GPU.
        what: its name in an error.

    Returns:
        A function that replays the graph.

    Raises:
        UsageError: the call cannot be captured.
    """
    try:
        for _ in range(_CALLS_BEFORE_CAPTURE):
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # PyTorch captures all graphs of a process on one stream, that of the GPU which it captured on first
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            work()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"{what} cannot be captured as a CUDA graph: {first_line(error)}\nMeasure it without --cuda-graph."
        ) from error
    replay: Callable[[], None] = graph.replay
    return replay


def measure_gpu_memory(device: torch.device, work: Callable[[], object], *, by_driver: bool) -> float | None:
    """Call `work` and measure the GPU memory that it took, in MiB; None where PyTorch uses no GPU.

    Args:
        device: of the network.
        work: builds a network and runs it once.
        by_driver: take the drop in the driver's free memory, for backends that allocate without PyTorch; else the peak
            of PyTorch's allocator.
    """
    if not _is_usable(device):
        work()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    allocated, free = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
    work()
    torch.cuda.synchronize(device)
    if by_driver:
        return float(max(free - torch.cuda.mem_get_info(device)[0], 0)) / 2**20
    return float(torch.cuda.max_memory_allocated(device) - allocated) / 2**20


def _is_usable(device: torch.device) -> bool:
    """Test whether PyTorch can use this device as a GPU.

    Where it cannot, ONNX Runtime still may; the runners of the other backends raise an error.
    """
    return device.type == "cuda" and torch.cuda.is_available()
