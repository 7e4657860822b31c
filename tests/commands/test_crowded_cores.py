"""The warning before training on a CPU whose cores are taken."""

from __future__ import annotations

import pytest
import torch

from passdeploy.commands import crowded_cores as module
from passdeploy.commands.crowded_cores import crowded_cores


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Describe a machine: cores, how many of them others keep busy, a container's quota and PyTorch's threads."""

    def describe(*, cores: int, busy: float | None, quota: float | None, threads: int) -> None:
        monkeypatch.setattr(module, "physical_cores", lambda: cores)
        monkeypatch.setattr(module, "busy_cores", lambda: busy)
        monkeypatch.setattr(module, "cpu_quota", lambda: quota)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    return describe


@pytest.mark.parametrize(
    ("cores", "busy", "quota", "threads", "advice"),
    [
        (2, 1.0, None, 2, "OMP_NUM_THREADS=1"),
        (16, 3.6, None, 16, "OMP_NUM_THREADS=12"),
        (2, 2.1, None, 2, "OMP_NUM_THREADS=1"),
        (2, 0.0, 2.5, 16, "OMP_NUM_THREADS=2"),
        (1, 0.0, 0.5, 8, "OMP_NUM_THREADS=1"),
    ],
)
def test_threads_that_share_cores_are_warned_of(
    machine, cores: int, busy: float, quota: float | None, threads: int, advice: str
):
    machine(cores=cores, busy=busy, quota=quota, threads=threads)
    text = crowded_cores()
    assert text is not None
    assert advice in text
    assert f"{threads} threads" in text
    assert (f"{busy:.1f} of {cores} cores busy" if busy else f"may use {quota:.3g} core") in text


@pytest.mark.parametrize(
    ("cores", "busy", "quota", "threads"),
    [
        (2, 0.1, None, 2),
        (2, 2.0, None, 1),
        (16, 1.0, None, 8),
        (8, 0.0, None, 16),
        (4, 0.0, 4.0, 4),
        (2, None, None, 2),
    ],
)
def test_threads_with_cores_of_their_own_are_not(
    machine, cores: int, busy: float | None, quota: float | None, threads: int
):
    machine(cores=cores, busy=busy, quota=quota, threads=threads)
    assert crowded_cores() is None
