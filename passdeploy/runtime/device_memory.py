"""Memory that does not suffice: errors of PyTorch, ONNX Runtime and CUDA as one error that names the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from passdeploy.errors import DeviceMemoryError

_WORDS = (
    "out of memory",  # PyTorch and CUDA itself
    "failed to allocate memory",  # ONNX Runtime
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "can't allocate memory",  # PyTorch on the CPU
)


def is_out_of_memory(error: BaseException) -> bool:
    """Test whether an exception says that memory does not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in _WORDS)


@contextmanager
def memory_errors(
    what: Callable[[], str], device: torch.device, *, advice: str, fitted: Callable[[], int | None] | None = None
) -> Iterator[None]:
    """Report memory that does not suffice inside the block as an error that names the batch.

    Args:
        what: returns what was being done, with the batch: `profile in torch: a batch of 64 images`.
        device: of the work.
        advice: what to do.
        fitted: returns the largest batch that did fit, None where none was tried; None: nothing is said of it.

    Raises:
        DeviceMemoryError: there was not enough memory.
    """
    try:
        yield
    except DeviceMemoryError:
        raise
    except Exception as error:  # the classes of ONNX Runtime have no common base
        if not is_out_of_memory(error):
            raise
        known = f"{_fitted_text(fitted())} " if fitted is not None else ""
        raise DeviceMemoryError(
            f"{what()} does not fit into the memory of {_memory_text(device)}.\n{known}{advice}"
        ) from error


def _fitted_text(batch: int | None) -> str:
    return "No smaller batch was tried." if batch is None else f"The largest batch that did fit: {batch}."


def _memory_text(device: torch.device) -> str:
    """Describe the memory of a device: its size, and what this process and others hold of it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "this machine"
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    gib = 1 << 30
    return (
        f"{device} ({torch.cuda.get_device_name(device)}, {total / gib:.1f} GiB: PyTorch holds {ours / gib:.1f}, "
        f"{free / gib:.1f} are free)"
    )
