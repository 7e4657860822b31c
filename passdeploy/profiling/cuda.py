"""CUDA streams, graphs and memory for measurements on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from passdeploy.errors import MissingError, UsageError, first_line

_WARM_UPS = 3  # calls before a capture: libraries choose their kernels and allocate in the first ones


@contextmanager
def stream_of(device: torch.device) -> Iterator[None]:
    """Queue work on a stream of its own: TensorRT and captures do not like the default one. Nothing on a CPU."""
    with torch.cuda.stream(torch.cuda.Stream(device)) if _is_ready(device) else nullcontext():
        yield


def captured(work: Callable[[], object], what: str) -> Callable[[], None]:
    """A call as a CUDA graph: what replays it.

    Args:
        work: queues the call; always the same memory, and nothing that waits for the GPU.
        what: it is called in an error.

    Raises:
        UsageError: it cannot be captured.
    """
    try:
        for _ in range(_WARM_UPS):
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        raise UsageError(
            f"{what} cannot be captured as a CUDA graph: {first_line(error)}\nMeasure it without --cuda-graph."
        ) from error
    replay: Callable[[], None] = graph.replay
    return replay


def memory_of(device: torch.device, work: Callable[[], object], *, by_driver: bool) -> float | None:
    """The most GPU memory, in MiB, that `work` and what it leaves behind took; None where PyTorch uses no GPU.

    Args:
        device: where.
        work: builds a network and runs it once.
        by_driver: ask the driver how much less is free afterwards, since not PyTorch allocates; else its own peak.
    """
    if not _is_ready(device):
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


def require_gpu_of_torch(what: str) -> None:
    """PyTorch sees a GPU, whose memory and streams `what` uses.

    Raises:
        MissingError: it does not.
    """
    if not torch.cuda.is_available():
        raise MissingError(f"{what} runs on an NVIDIA GPU, and PyTorch sees none here.")


def _is_ready(device: torch.device) -> bool:
    """Whether PyTorch can use this GPU. Where it cannot, ONNX Runtime may still, and the others say what is missing."""
    return device.type == "cuda" and torch.cuda.is_available()
