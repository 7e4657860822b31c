"""A warning before training on a CPU: more threads than the cores that are free for them."""

from __future__ import annotations

import torch

from passdeploy.profiling.disturbances import OTHERS_BUSY
from passdeploy.profiling.environment import busy_cores, cpu_quota, physical_cores

_SLACK = 0.5  # cores; below this the threads hardly wait


def crowded_cores() -> str | None:
    """Say that PyTorch's threads have to share cores, and what to do; None if they do not.

    Threads that compute one layer together wait for the last of them, and spin while they wait. So two threads beside
    two busy processes are slower than one, 3.6 times so in ResNet-20 on two cores.
    """
    threads = torch.get_num_threads()
    if threads < 2:
        return None
    busy, cores, quota = busy_cores() or 0.0, physical_cores(), cpu_quota()
    if busy > OTHERS_BUSY and threads > cores - busy + _SLACK:
        free, reason = cores - busy, f"other processes keep {busy:.1f} of {cores} cores busy"
    elif quota is not None and threads > quota + _SLACK:
        free, reason = quota, f"this container may use {quota:.3g} core{'s' * (quota != 1)}"
    else:
        return None
    return (
        f"{reason}, and PyTorch computes with {threads} threads that wait for each other: training can take several "
        f"times as long.\nSet OMP_NUM_THREADS={max(1, int(free))} in the environment, or wait until the cores are free."
    )
