"""What a step of mask learning costs, against a plain training step of the same network, measured in turns.

    python benchmarks/mask_step.py [--turns 12]

The networks have random weights: neither time nor memory depends on them. Prints the ratios of the median times and of
the memory (the peak of a process that takes three such steps, above that of one that takes none), and writes them to
`benchmarks/results/mask_step.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice, repeat
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
Batch = tuple[Tensor, Tensor]


WALKS: dict[str, Callable[[Batch, int], Iterator[float]]] = {
    "plain": lambda batch, turns: _plain(batch, turns),
    "masks, frozen weights": lambda batch, turns: _masks(batch, turns, weights="frozen", distill=0.0),
    "masks and weights": lambda batch, turns: _masks(batch, turns, weights="trained", distill=0.0),
    "masks and weights, distilled": lambda batch, turns: _masks(batch, turns, weights="trained", distill=0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--peak-of", choices=("nothing", *WALKS), help="print the peak memory of this process, in KiB")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    batch = images, torch.randint(10, (BATCH,))
    if asked.peak_of:
        for _ in islice(WALKS[asked.peak_of](batch, 4), 3) if asked.peak_of != "nothing" else ():
            pass
        print(_peak_kib())
        return
    times: dict[str, list[float]] = {name: [] for name in WALKS}
    walks = {name: walk(batch, asked.turns) for name, walk in WALKS.items()}
    for _ in range(asked.turns):
        for name, walk in walks.items():
            times[name].append(next(walk))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first one warms up
    ratios = {name: medians[name] / medians["plain"] for name in medians}
    peaks = {name: _peak_mib(name) for name in ("nothing", *WALKS)}
    memory = {name: (peaks[name] - peaks["nothing"]) / (peaks["plain"] - peaks["nothing"]) for name in WALKS}
    for name, ratio in ratios.items():
        print(f"{name:30} {1000 * medians[name]:8.1f} ms  {ratio:.2f}x  memory {memory[name]:.2f}x")
    document = {
        "network": "ResNet-20, batch of 128, one CPU thread, half of the MACs", "turns": asked.turns - 1,
        "median_ms": {name: 1000 * value for name, value in medians.items()}, "ratio": ratios,
        "memory_ratio": memory, "versions": package_versions(),
    }  # fmt: skip
    write_atomically(RESULTS, json.dumps(document, indent=1) + "\n")
    print(RESULTS)


def _peak_kib() -> int:
    """Peak memory of this process (Linux; `getrusage` would count what the parent had when it forked)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _peak_mib(name: str) -> float:
    """The peak memory of a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


def _plain(batch: Batch, turns: int) -> Iterator[float]:
    """Seconds of each step of ordinary training."""
    network = resnet20_cifar().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    for _ in range(turns):
        began = perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(network(batch[0]), batch[1]).backward()
        optimizer.step()
        yield perf_counter() - began


def _masks(batch: Batch, turns: int, *, weights: str, distill: float) -> Iterator[float]:
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

    settings = PassSettings(
        steps=turns + 1, round_to=1, anneal=0.0, distill=distill, prior_batches=1, prompt_size=4, weights=weights
    )
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
