"""Steps of mask learning and growing regularisation on a GPU, against plain training steps with the same teacher.

Part of `mask_step.py`. A plain step is the least that training with a teacher does: one batch that stays on the device,
forward passes of network and teacher, backward pass, optimiser; nothing is read back. All are timed by the wall, over
many steps, with the GPU awaited at both ends. Mask learning runs its whole schedule, plans and cuts included.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.grouping.find import map_channels
from passdeploy.models.cifar_resnet import resnet20_cifar
from passdeploy.recipe import OptimizerSpec
from passdeploy.runtime.events import Stage, silent
from passdeploy.sparsity.growing import grow_penalty
from passdeploy.sparsity.learn import learn_masks
from passdeploy.sparsity.settings import PassSettings
from passdeploy.training.losses import DistillationLoss
from passdeploy.training.optimizers import make_optimizer

SPEC = OptimizerSpec(lr=0.01)
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


@dataclass(frozen=True)
class Workload:
    """A network with its batch, and the number of steps that are timed."""

    name: str
    build: Callable[[], nn.Module]
    image_size: int
    batch: int
    classes: int
    plain_steps: int
    mask_steps: int


WORKLOADS = (
    Workload("ResNet-20, 32 px, batch 128", resnet20_cifar, 32, 128, 10, 100, 300),
    Workload("ResNet-50, 224 px, batch 64", torchvision.models.resnet50, 224, 64, 1000, 50, 150),
)


def measure(workload: Workload, device: torch.device, turns: int) -> dict[str, float]:
    """Time plain training, mask learning and growing regularisation in turns."""
    torch.manual_seed(0)
    network = workload.build().eval()
    images = torch.randn(workload.batch, 3, workload.image_size, workload.image_size)
    channels = map_channels(network, images[:1])
    network = network.to(device, memory_format=torch.channels_last)
    images = images.to(device, memory_format=torch.channels_last)
    task = _Task(network, channels, (images, torch.randint(workload.classes, (workload.batch,)).to(device)))
    task.plain(5)
    task.masks(12)
    times: dict[str, list[float]] = {"plain": [], "masks": [], "masks_first": [], "growing": []}
    for _ in range(turns):
        times["plain"].append(task.plain(workload.plain_steps))
        whole, first = task.masks(workload.mask_steps)
        times["masks"].append(whole)
        times["masks_first"].append(first)
        times["growing"].append(task.growing(workload.plain_steps))
    row = {f"{name}_ms": 1000 * statistics.median(values) for name, values in times.items()}
    row |= {f"{name}_over_plain": row[f"{name}_ms"] / row["plain_ms"] for name in times if name != "plain"}
    if device.type == "cuda":
        row |= {f"plain_{name}": count for name, count in task.counted(task.plain, 40, start=21, count=15).items()}
        middle = task.counted(task.masks, workload.mask_steps, start=workload.mask_steps // 3, count=40)
        row |= {f"masks_{name}": count for name, count in middle.items()}
    return row


class _Task:
    """The loops that are timed; each returns seconds per step."""

    def __init__(self, network: nn.Module, channels: ChannelMap, batch: tuple[Tensor, Tensor]) -> None:
        self.network, self.channels, self.batch = network, channels, batch

    def plain(self, steps: int, watch: _Watch | None = None) -> float:
        network = copy.deepcopy(self.network).train()
        teacher, optimizer = DistillationLoss(copy.deepcopy(network).eval()), make_optimizer(network, SPEC)
        watch = watch or _Watch(self.batch[0].device)
        for done in range(steps + 1):
            watch.step(done, steps)
            optimizer.zero_grad()
            output = network(self.batch[0])
            loss = F.cross_entropy(output, self.batch[1])
            teacher.loss_of_output(loss, output, *self.batch).backward()
            optimizer.step()
        watch.step(steps + 1, steps)
        return watch.per_step(1, steps + 1)

    def masks(self, steps: int, watch: _Watch | None = None) -> tuple[float, float]:
        """Return also the seconds of a step before much is cut."""
        watch = watch or _Watch(self.batch[0].device)
        settings = PassSettings(
            steps=steps, round_to=1, distill=0.5, prior_batches=1, prompt_size=4, weights_optimizer=SPEC
        )
        learn_masks(
            self.network,
            self.channels.groups,
            lambda: repeat(self.batch),
            F.cross_entropy,
            costs=self.channels.costs,
            budget={"macs": 0.5},
            settings=settings,
            stage=watch,
        )
        return watch.per_step(10, steps), watch.per_step(10, min(20, steps))

    def growing(self, steps: int) -> float:
        watch = _Watch(self.batch[0].device)
        halves = Plan({group.name: tuple(range(0, group.width, 2)) for group in self.channels.prunable})
        teacher = DistillationLoss(copy.deepcopy(self.network).eval())
        grow_penalty(
            self.network,
            self.channels.groups,
            halves,
            repeat(self.batch),
            F.cross_entropy,
            steps=steps + 10,
            optimizer=OptimizerSpec(lr=0.01),
            distillation=teacher,
            stage=watch,
        )
        return watch.per_step(10, steps + 10)

    def counted(self, loop: Callable[[int, _Watch], Any], steps: int, *, start: int, count: int) -> dict[str, float]:
        """Count kernel launches and waits of a step with torch's profiler, over some of the steps of a loop."""
        watch = _Profiled(self.batch[0].device, start, count)
        loop(steps, watch)
        return watch.counts()


class _Watch(Stage):
    """A stage that notes when steps are done; the GPU is awaited at the ends of what is timed."""

    def __init__(self, device: torch.device) -> None:
        super().__init__("benchmark", silent)
        self._device, self._times = device, dict[int, float]()

    def step(self, done: int, total: int, **metrics: float) -> None:
        if self._device.type == "cuda" and done in (1, 10, 20, total, total + 1):
            torch.cuda.synchronize(self._device)
        self._times[done] = perf_counter()

    def per_step(self, first: int, last: int) -> float:
        """Return the seconds of a step between the reports of two steps."""
        return (self._times[last] - self._times[first]) / (last - first)


class _Profiled(_Watch):
    """A stage that profiles some steps."""

    def __init__(self, device: torch.device, start: int, steps: int) -> None:
        super().__init__(device)
        self._start, self._steps = start, steps
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self._profiler = torch.profiler.profile(activities=activities)

    def step(self, done: int, total: int, **metrics: float) -> None:
        super().step(done, total, **metrics)
        if done == self._start:
            self._profiler.start()
        if done == self._start + self._steps:
            self._profiler.stop()

    def counts(self) -> dict[str, float]:
        """Return the launches and waits of a step."""
        found = {event.key: event.count for event in self._profiler.key_averages()}
        return {
            name: sum(found.get(key, 0) for key in keys) / self._steps
            for name, keys in (("launches", LAUNCHES), ("waits", WAITS))
        }


def table(rows: dict[str, dict[str, float]]) -> str:
    """Write the rows as a small table."""
    lines = [f"{'':30}{'plain':>9}{'masks':>9}{'':>8}{'at first':>10}{'growing':>10}{'launches':>18}{'waits':>14}"]
    for name, row in rows.items():
        launches, waits = (
            f"{row[f'plain_{kind}']:.0f} / {row[f'masks_{kind}']:.{digits}f}" if f"plain_{kind}" in row else "-"
            for kind, digits in (("launches", 0), ("waits", 2))
        )
        lines.append(
            f"{name:30}{row['plain_ms']:6.1f} ms{row['masks_ms']:6.1f} ms{row['masks_over_plain']:7.2f}x"
            f"{row['masks_first_over_plain']:9.2f}x{row['growing_over_plain']:9.2f}x{launches:>18}{waits:>14}"
        )
    return "\n".join(lines)
