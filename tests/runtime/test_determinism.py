"""Deterministic algorithms: what is switched on, what is restored, and the error for an operation that has none."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.errors import NondeterministicError, UsageError
from passdeploy.runtime import determinism
from passdeploy.runtime.determinism import deterministic_algorithms
from passdeploy.runtime.events import Event, Warned

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def settings() -> tuple[Any, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
    )


@pytest.fixture
def no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variable of cuBLAS for this test, whatever it was before."""
    monkeypatch.setenv(determinism.WORKSPACE_VARIABLE, "")
    monkeypatch.delenv(determinism.WORKSPACE_VARIABLE)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_settings_hold_inside_and_are_restored(error: type[BaseException] | None):
    before = settings()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    changed = settings()
    try:
        with deterministic_algorithms(True, CPU):
            assert settings() == (True, False, False, False, True)
            if error is not None:
                raise error
    except KeyboardInterrupt:
        pass
    assert settings() == changed
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.backends.cudnn.benchmark = before[3]
    with deterministic_algorithms(False, GPU):
        assert settings() == before


class Puts(nn.Module):
    """A layer that calls an operation without a deterministic kernel, on the CPU too."""

    def forward(self, images: Tensor) -> Tensor:
        return images.clone().put_(torch.tensor([0]), torch.ones(1))


def test_an_operation_without_a_deterministic_kernel_is_named_with_its_layer():
    network = nn.Sequential(nn.Identity(), nn.Sequential(Puts()))
    with (
        pytest.raises(NondeterministicError, match=r"put_ in layer '1\.0' \(Puts\) has no .* \(cpu\)") as caught,
        deterministic_algorithms(True, CPU, network=network),
    ):
        network(torch.zeros(1, 3))
    assert "deterministic: false" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    with deterministic_algorithms(False, CPU, network=network):
        assert network(torch.zeros(1, 3))[0, 0] == 1


def test_the_layers_of_a_failed_backward_pass_are_guessed_by_their_class():
    network = nn.Sequential(nn.AdaptiveMaxPool2d(2), nn.Flatten())
    message = "adaptive_max_pool2d_backward_cuda does not have a deterministic implementation, but you set ..."
    with (
        pytest.raises(NondeterministicError, match=r"adaptive_max_pool2d_backward_cuda \(of 0\) has no"),
        deterministic_algorithms(True, CPU, network=network),
    ):
        raise RuntimeError(message)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), deterministic_algorithms(True, CPU):
        raise RuntimeError("shapes do not match")


def test_cublas_gets_its_workspace_before_cuda_starts(no_workspace: None, monkeypatch: pytest.MonkeyPatch):
    heard: list[Event] = []
    with deterministic_algorithms(True, GPU, listener=heard.append):
        assert os.environ[determinism.WORKSPACE_VARIABLE] == ":4096:8"
    assert not heard
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    determinism.require_cublas_workspace_(heard.append)
    assert not heard  # it was set before
    monkeypatch.delenv(determinism.WORKSPACE_VARIABLE)
    determinism.require_cublas_workspace_(heard.append)
    assert isinstance(heard[0], Warned)
    assert "CUDA started in this process before CUBLAS_WORKSPACE_CONFIG was set" in heard[0].text


def test_a_workspace_that_is_not_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(determinism.WORKSPACE_VARIABLE, ":0:0")
    with pytest.raises(UsageError, match="CUBLAS_WORKSPACE_CONFIG=:0:0"), deterministic_algorithms(True, GPU):
        pass
    with deterministic_algorithms(True, CPU):
        pass


@pytest.mark.parametrize("size", [1, 7, 5, (3, 7), (None, 2), 12])
def test_deterministic_pooling_is_adaptive_pooling(size: Any):
    images = torch.randn(2, 3, 7, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = []
    for pool in (F.adaptive_avg_pool2d, determinism.adaptive_avg_pool2d):
        given = images.clone().requires_grad_()
        output = pool(given, size)
        (output * torch.arange(output.numel(), dtype=torch.float64).view(output.shape)).sum().backward()
        gradients.append((output.detach(), given.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_only_a_network_that_pools_to_several_values_on_a_gpu_is_changed(
    no_workspace: None, monkeypatch: pytest.MonkeyPatch
):
    calls: list[Any] = []
    monkeypatch.setattr(determinism, "adaptive_avg_pool2d", lambda *given: calls.append(given[1]) or given[0])
    images = torch.zeros(1, 1, 8, 8)
    for device, size in ((GPU, 1), (CPU, 2), (GPU, (1, 1)), (GPU, 2)):
        network = nn.Sequential(nn.AdaptiveAvgPool2d(size))
        with deterministic_algorithms(True, device, network=network):
            network(images)
    assert calls == [2]


def test_a_summary_says_what_the_bits_depend_on(monkeypatch: pytest.MonkeyPatch):
    assert determinism.reproducibility_facts(True, CPU) == {"deterministic": True, "device": "cpu", "gpu": None}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    facts = determinism.reproducibility_facts(False, GPU)
    assert (facts["gpu"], facts["compute_capability"], facts["deterministic"]) == ("Imaginary GPU", "9.0", False)
    assert facts["fp32_precision"].keys() == {"matmul", "convolution"}
