"""What a step of mask learning costs, against a plain training step of the same network, measured in turns.

    python benchmarks/mask_step.py [--turns 12]

The networks have random weights: the time does not depend on them. Prints the ratio of the medians and writes it to
`benchmarks/results/mask_step.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from passdeploy.channels.mapping import map_channels
from passdeploy.events import Stage
from passdeploy.files import write_atomically
from passdeploy.networks import resnet20_cifar
from passdeploy.sparsity.learn import PassSettings, learn_masks
from passdeploy.versions import package_versions

RESULTS = Path(__file__).parent / "results" / "mask_step.json"
BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=12)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    batch = images, torch.randint(10, (BATCH,))
    times: dict[str, list[float]] = {"plain": [], "masks": [], "masks, distilled": []}
    walks = {
        "plain": _plain(batch, turns),
        "masks": _masks(batch, turns, distill=0.0),
        "masks, distilled": _masks(batch, turns, distill=0.5),
    }
    for _ in range(turns):
        for name, walk in walks.items():
            times[name].append(next(walk))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first one warms up
    ratios = {name: medians[name] / medians["plain"] for name in medians}
    for name, ratio in ratios.items():
        print(f"{name:20} {1000 * medians[name]:8.1f} ms  {ratio:.2f}x")
    document = {
        "network": "ResNet-20, batch of 128, one CPU thread, half of the MACs", "turns": turns - 1,
        "median_ms": {name: 1000 * value for name, value in medians.items()}, "ratio": ratios,
        "versions": package_versions(),
    }  # fmt: skip
    write_atomically(RESULTS, json.dumps(document, indent=1) + "\n")
    print(RESULTS)


def _plain(batch: tuple[Tensor, Tensor], turns: int) -> Iterator[float]:
    """Seconds of each step of ordinary training."""
    network = resnet20_cifar().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    for _ in range(turns):
        began = perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(network(batch[0]), batch[1]).backward()
        optimizer.step()
        yield perf_counter() - began


def _masks(batch: tuple[Tensor, Tensor], turns: int, *, distill: float) -> Iterator[float]:
    """Seconds of each step of mask learning; the loop of the library runs in a thread of its own, one step a turn."""
    from queue import Queue
    from threading import Thread

    network = resnet20_cifar().eval().to(memory_format=torch.channels_last)
    channels = map_channels(network, batch[0][:1])
    wanted: Queue[None] = Queue()
    ended: Queue[float] = Queue()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        return repeat(batch)

    class Clocked(Stage):
        began = 0.0

        def step(self, done: int, total: int, **metrics: float) -> None:
            ended.put(perf_counter() - Clocked.began)
            wanted.get()
            Clocked.began = perf_counter()

    settings = PassSettings(steps=turns + 1, round_to=1, anneal=0.0, distill=distill, prior_batches=1, prompt_size=4)
    work = Thread(
        target=learn_masks, args=(network, channels.groups, batches, F.cross_entropy), daemon=True,
        kwargs={"costs": channels.costs, "settings": settings, "stage": Clocked("learn", lambda event: None)},
    )  # fmt: skip
    work.start()
    ended.get()  # the first step, with all that is done once before it
    for _ in range(turns):
        wanted.put(None)
        yield ended.get()


if __name__ == "__main__":
    main()
