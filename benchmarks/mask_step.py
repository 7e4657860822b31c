"""Benchmark of a step of mask learning against a plain training step of the same network, measured in turns.

    python -m benchmarks.mask_step [--network mobilenet_v2] [--turns 40] [--device cuda] [--out FILE]

On a CPU mask learning runs its whole schedule, from the dense network to the budget, in turns with plain steps; the
mean processor times of a step are compared. Plain steps train the dense network with the same loss and the same
optimizer: the labels alone, or in half of the loss the outputs of a frozen copy (distilled). The networks have random
weights, since neither time nor memory depends on them. Memory is the peak of a process that takes three steps, before
channels are removed (finding the groups included), above that of one that takes none; the median of three processes.
On a GPU: see `mask_step_gpu.py`. Writes `benchmarks/results/mask_step.json`, where results of networks that are not
asked for stay, or `mask_step_gpu.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
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
from torch import Tensor, nn
from torchvision.models import get_model

from benchmarks.mask_step_gpu import WORKLOADS, measure, table
from passdeploy.grouping.find import map_channels
from passdeploy.models.cifar_resnet import resnet20_cifar
from passdeploy.recipe import OptimizerSpec
from passdeploy.runtime.events import Stage
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.versions import package_versions
from passdeploy.sparsity.learn import learn_masks
from passdeploy.sparsity.settings import PassSettings
from passdeploy.training.losses import DistillationLoss
from passdeploy.training.optimizers import make_optimizer

RESULTS = Path(__file__).parent / "results" / "mask_step.json"
RESULTS_GPU = RESULTS.with_name("mask_step_gpu.json")
BATCH = 64
Batch = tuple[Tensor, Tensor]
NETWORKS = {  # name -> factory, pixels of its images
    "resnet20": (resnet20_cifar, 32),
    "mobilenet_v2": (partial(get_model, "mobilenet_v2", num_classes=10), 64),
}

NOTHING = "nothing"
_SCHEDULE = 300  # steps of a schedule whose first three remove hardly anything
PLAIN = {"plain": 0.0, "plain, distilled": 0.5}  # name -> weight of the distillation loss
MASKS = {  # name -> share of the multiply-adds to keep, `prune.weights`, weight of the distillation loss
    "masks to 50%, weights frozen": (0.5, "frozen", 0.0),
    "masks to 50%, weights trained": (0.5, "trained", 0.0),
    "masks to 50%, weights trained, distilled": (0.5, "trained", 0.5),
    "masks to 30%, weights trained": (0.3, "trained", 0.0),
    "masks to 30%, weights trained, distilled": (0.3, "trained", 0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, help="left out: all of them, one after the other")
    parser.add_argument("--turns", type=int, help="on a CPU steps of every kind (40), on a GPU blocks of steps (3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="JSON file to write; left out: one in benchmarks/results/")
    parser.add_argument("--peak-of", choices=(NOTHING, *PLAIN, *MASKS), help="print the peak of this process, in KiB")
    options = parser.parse_args()
    if options.device != "cpu":
        measure_on_gpu(torch.device(options.device), options.turns or 3, options.out or RESULTS_GPU)
        return
    torch.set_num_threads(1)
    turns, out = options.turns or 40, options.out or RESULTS
    if options.peak_of:
        if options.peak_of != NOTHING:
            for _ in islice(_step_times(options.peak_of, options.network, _SCHEDULE), 3):
                pass
        print(_peak_kib())
        return
    document = {"networks": {}, **(json.loads(out.read_text()) if out.is_file() else {})}
    for network in [options.network] if options.network else NETWORKS:
        document["networks"][network] = {
            "pixels": NETWORKS[network][1],
            "batch": BATCH,
            "threads": 1,
            "steps": turns - 1,
            "rows": measure_network(network, turns),
            "versions": package_versions(),
        }
        write_atomically(out, json.dumps(document, indent=1) + "\n")
    print(out)


def measure_network(network: str, turns: int) -> dict[str, dict[str, float]]:
    """Time the steps of every kind in turns, and compare them with plain ones."""
    times: dict[str, list[float]] = {name: [] for name in (*PLAIN, *MASKS)}
    timers = {name: _step_times(name, network, turns) for name in times}
    for _ in range(turns):
        for name, timer in timers.items():
            times[name].append(next(timer))
    means = {name: statistics.mean(values[1:]) for name, values in times.items()}  # the first one warms up
    first = {name: statistics.mean(values[1:4]) for name, values in times.items()}  # hardly anything has gone yet
    peaks = {name: _peak_mib(name, network) for name in (NOTHING, *PLAIN, *MASKS)}
    rows = {}
    print(network)
    for name in times:
        plain = "plain, distilled" if name.endswith("distilled") else "plain"
        rows[name] = {
            "cpu_ms": 1000 * means[name],
            "over_plain": means[name] / means["plain"],
            "over_plain_with_the_same_loss": means[name] / means[plain],
            "first_steps_over_plain_with_the_same_loss": first[name] / first[plain],
            "memory_over_plain_with_the_same_loss": _memory_above_baseline(peaks, name)
            / _memory_above_baseline(peaks, plain),
        }
        print(f"{name:42} {rows[name]['cpu_ms']:7.1f} ms", *(f"{value:.2f}x" for value in [*rows[name].values()][1:]))
    return rows


def measure_on_gpu(device: torch.device, turns: int, out: Path) -> None:
    """Time and count the workloads of `mask_step_gpu.py`, and write what was found after each."""
    rows = {}
    for workload in WORKLOADS:
        rows[workload.name] = measure(workload, device, turns)
        document = {"device": torch.cuda.get_device_name(device), "rows": rows, "versions": package_versions()}
        write_atomically(out, json.dumps(document, indent=1) + "\n")
    print(f"{document['device']}, float32, milliseconds of a step, median of {turns} turns; counts: plain / masks")
    print(table(rows))
    print(out)


def _memory_above_baseline(peaks: dict[str, float], name: str) -> float:
    return peaks[name] - peaks[NOTHING]


def _peak_kib() -> int:
    """Return the peak memory of this process (Linux; `getrusage` would include the parent's memory at the fork)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _peak_mib(name: str, network: str) -> float:
    """Measure the peak memory of three steps in new processes, the median of three.

    Masks are learned in a thread here. The C library would give it a heap of its own, and pages that the other heap has
    freed would count twice.
    """
    command = [sys.executable, "-m", "benchmarks.mask_step", "--peak-of", name, "--network", network]
    environment, root = os.environ | {"MALLOC_ARENA_MAX": "1"}, Path(__file__).parents[1]
    run = partial(subprocess.run, command, capture_output=True, text=True, check=True, cwd=root, env=environment)
    return statistics.median(int(run().stdout) / 1024 for _ in range(3))


def _step_times(name: str, network: str, turns: int) -> Iterator[float]:
    """Yield the CPU seconds of each step of a kind of training, of a new network."""
    torch.manual_seed(0)
    factory, pixels = NETWORKS[network]
    images = torch.randn(BATCH, 3, pixels, pixels).to(memory_format=torch.channels_last)
    batch = images, torch.randint(10, (BATCH,))
    model = factory().to(memory_format=torch.channels_last)
    if name in PLAIN:
        return _plain_step_times(model, batch, turns, distill=PLAIN[name])
    share, weights, distill = MASKS[name]
    return _mask_step_times(model, batch, turns, share=share, weights=weights, distill=distill)


def _plain_step_times(network: nn.Module, batch: Batch, turns: int, *, distill: float) -> Iterator[float]:
    """Yield the CPU seconds of each step of plain training."""
    network.train()
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


def _mask_step_times(
    network: nn.Module, batch: Batch, turns: int, *, share: float, weights: str, distill: float
) -> Iterator[float]:
    """Yield the CPU seconds of each step of mask learning; the library's loop runs in a thread, one step at a time."""
    network.eval()
    channels = map_channels(network, batch[0][:1])
    requested_steps: Queue[None] = Queue()
    step_seconds: Queue[float] = Queue()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        return repeat(batch)

    class StepTimer(Stage):
        began = 0.0

        def step(self, done: int, total: int, **metrics: float) -> None:
            step_seconds.put(process_time() - StepTimer.began)
            requested_steps.get()
            StepTimer.began = process_time()

    settings = PassSettings(
        steps=turns + 1, round_to=1, distill=distill, prior_batches=1, prompt_size=4, weights=weights
    )
    options = {
        "costs": channels.costs,
        "budget": {"macs": share},
        "settings": settings,
        "stage": StepTimer("learn", lambda event: None),
    }
    task = network, channels.groups, batches, F.cross_entropy
    work = Thread(target=learn_masks, args=task, kwargs=options, daemon=True)
    work.start()
    step_seconds.get()  # the first step, with all that is done once before it
    for _ in range(turns):
        requested_steps.put(None)
        yield step_seconds.get()


if __name__ == "__main__":
    main()
