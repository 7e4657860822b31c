"""What a step of mask learning costs, against a plain training step of the same network, measured in turns.

    python benchmarks/mask_step.py [--turns 40]

A whole schedule of mask learning is walked, from the dense network to the budget, one step a turn with a plain step
beside it; what is compared is the mean processor time of a step. Plain steps train the dense network with the same loss
and the same optimizer: labels alone, or half of it the answers of a frozen copy of it (distilled). The networks have
random weights: neither time nor memory depends on them. Memory is the peak of a process that takes three steps, when
nothing has gone yet, above that of one that takes none. Writes `benchmarks/results/mask_step.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from queue import Queue
from threading import Thread
from time import process_time

import torch
import torch.nn.functional as F
from torch import Tensor

from passdeploy.grouping.find import map_channels
from passdeploy.models.cifar_resnet import resnet20_cifar
from passdeploy.recipe import OptimizerSpec
from passdeploy.runtime.events import Stage
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.versions import package_versions
from passdeploy.sparsity.learn import PassSettings, learn_masks
from passdeploy.training.losses import DistillationLoss
from passdeploy.training.optimizers import make_optimizer

RESULTS = Path(__file__).parent / "results" / "mask_step.json"
BATCH = 64
Batch = tuple[Tensor, Tensor]


PLAIN = {"plain": 0.0, "plain, distilled": 0.5}  # name -> share of the loss that a teacher's answers are
MASKS = {  # name -> share of the multiply-adds that stay, what weights do, share of the teacher's answers
    "masks to 50%, weights frozen": (0.5, "frozen", 0.0),
    "masks to 50%, weights trained": (0.5, "trained", 0.0),
    "masks to 50%, weights trained, distilled": (0.5, "trained", 0.5),
    "masks to 30%, weights trained": (0.3, "trained", 0.0),
    "masks to 30%, weights trained, distilled": (0.3, "trained", 0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=40, help="steps of every kind")
    parser.add_argument("--peak-of", choices=("nothing", *PLAIN, *MASKS), help="print the peak of this process, in KiB")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    batch = images, torch.randint(10, (BATCH,))
    if asked.peak_of:
        for _ in islice(_walk(asked.peak_of, batch, 4), 3) if asked.peak_of != "nothing" else ():
            pass
        print(_peak_kib())
        return
    times: dict[str, list[float]] = {name: [] for name in (*PLAIN, *MASKS)}
    walks = {name: _walk(name, batch, asked.turns) for name in times}
    for _ in range(asked.turns):
        for name, walk in walks.items():
            times[name].append(next(walk))
    means = {name: statistics.mean(values[1:]) for name, values in times.items()}  # the first one warms up
    first = {name: statistics.mean(values[1:4]) for name, values in times.items()}  # hardly anything has gone yet
    peaks = {name: _peak_mib(name) for name in ("nothing", *PLAIN, *MASKS)}
    rows = {}
    for name in times:
        plain = "plain, distilled" if name.endswith("distilled") else "plain"
        rows[name] = {
            "cpu_ms": 1000 * means[name], "over_plain": means[name] / means["plain"],
            "over_plain_with_the_same_loss": means[name] / means[plain],
            "first_steps_over_plain_with_the_same_loss": first[name] / first[plain],
            "memory_over_plain_with_the_same_loss": _above(peaks, name) / _above(peaks, plain),
        }  # fmt: skip
        print(f"{name:42} {rows[name]['cpu_ms']:7.1f} ms", *(f"{value:.2f}x" for value in [*rows[name].values()][1:]))
    document = {
        "network": f"ResNet-20, batch of {BATCH}, one CPU thread", "steps": asked.turns - 1, "rows": rows,
        "versions": package_versions(),
    }  # fmt: skip
    write_atomically(RESULTS, json.dumps(document, indent=1) + "\n")
    print(RESULTS)


def _above(peaks: dict[str, float], name: str) -> float:
    return peaks[name] - peaks["nothing"]


def _peak_kib() -> int:
    """Peak memory of this process (Linux; `getrusage` would count what the parent had when it forked)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _peak_mib(name: str) -> float:
    """The peak memory of a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


def _walk(name: str, batch: Batch, turns: int) -> Iterator[float]:
    if name in PLAIN:
        return _plain(batch, turns, distill=PLAIN[name])
    share, weights, distill = MASKS[name]
    return _masks(batch, turns, share=share, weights=weights, distill=distill)


def _plain(batch: Batch, turns: int, *, distill: float) -> Iterator[float]:
    """CPU seconds of each step of ordinary training."""
    network = resnet20_cifar().train().to(memory_format=torch.channels_last)
    teacher = copy.deepcopy(network).eval()
    optimizer = make_optimizer(network, OptimizerSpec(lr=0.01))
    for _ in range(turns):
        began = process_time()
        optimizer.zero_grad()
        logits = network(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        if distill:
            each = partial(F.cross_entropy, target=batch[1], reduction="none")
            loss = DistillationLoss(teacher, distill).loss(loss, logits, batch[0], each)
        loss.backward()
        optimizer.step()
        yield process_time() - began


def _masks(batch: Batch, turns: int, *, share: float, weights: str, distill: float) -> Iterator[float]:
    """CPU seconds of each step of mask learning; the library's loop runs in a thread of its own, one step a turn."""
    network = resnet20_cifar().eval().to(memory_format=torch.channels_last)
    channels = map_channels(network, batch[0][:1])
    wanted: Queue[None] = Queue()
    ended: Queue[float] = Queue()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        return repeat(batch)

    class Clocked(Stage):
        began = 0.0

        def step(self, done: int, total: int, **metrics: float) -> None:
            ended.put(process_time() - Clocked.began)
            wanted.get()
            Clocked.began = process_time()

    settings = PassSettings(
        steps=turns + 1, round_to=1, distill=distill, prior_batches=1, prompt_size=4, weights=weights
    )
    options = {
        "costs": channels.costs, "budget": {"macs": share}, "settings": settings,
        "stage": Clocked("learn", lambda event: None),
    }  # fmt: skip
    task = network, channels.groups, batches, F.cross_entropy
    work = Thread(target=learn_masks, args=task, kwargs=options, daemon=True)
    work.start()
    ended.get()  # the first step, with all that is done once before it
    for _ in range(turns):
        wanted.put(None)
        yield ended.get()


if __name__ == "__main__":
    main()
