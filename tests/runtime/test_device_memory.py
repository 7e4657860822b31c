from __future__ import annotations

import pytest
import torch

from passdeploy.errors import DeviceMemoryError
from passdeploy.runtime.device_memory import memory_errors

GIB = 1 << 30


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        Exception("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 1073741824"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000 bytes."),
    ],
)
def test_too_little_memory_names_the_batch_and_the_device(error: Exception, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB // 2, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 78 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary GPU")
    with (
        pytest.raises(DeviceMemoryError) as caught,
        memory_errors(lambda: "stage dense: a batch of 64 images", torch.device("cuda"), advice="Halve it."),
    ):
        raise error
    assert str(caught.value) == (
        "stage dense: a batch of 64 images does not fit into the memory of cuda "
        "(Imaginary GPU, 80.0 GiB: PyTorch holds 78.0, 0.5 are free).\nHalve it."
    )
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("largest", "words"),
    [(16, r"The largest batch that did fit: 16\. Halve it"), (None, r"No smaller batch was tried\. Halve it")],
)
def test_the_largest_batch_that_did_fit_is_told(largest: int | None, words: str):
    with (
        pytest.raises(DeviceMemoryError, match=f"memory of this machine.\n{words}"),
        memory_errors(lambda: "a batch of 64", torch.device("cpu"), advice="Halve it.", fitted=lambda: largest),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_other_errors_stay_what_they_are():
    with (
        pytest.raises(RuntimeError, match="shapes"),
        memory_errors(lambda: "", torch.device("cpu"), advice=""),
    ):
        raise RuntimeError("shapes do not match")
