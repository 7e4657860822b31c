from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passdeploy.latency import torch_sampler
from passdeploy.latency.torch_sampler import TorchSampler
from passdeploy.profiling.runners import TorchRunner


def test_a_network_is_built_with_the_threads_that_it_is_timed_with(monkeypatch: pytest.MonkeyPatch):
    """Code that was compiled for another number of threads is compiled once more in the first call."""
    seen: list[int] = []

    class Runner(TorchRunner):
        def prepare(self, images: Tensor, *others: Tensor) -> None:
            seen.append(torch.get_num_threads())
            super().prepare(images, *others)

        def run(self) -> None:
            seen.append(torch.get_num_threads())
            super().run()

    def make_runner(candidate: Any, *_: object) -> Runner:
        return Runner(candidate.name, candidate.module)

    monkeypatch.setattr(torch_sampler, "make_runner", make_runner)
    before = torch.get_num_threads()
    sampler = TorchSampler(lambda _: nn.ReLU(), torch.zeros(1, 3, 4, 4), threads=before + 1, block=8, backend="compile")
    sampler.measure({}, seconds=0.0)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
