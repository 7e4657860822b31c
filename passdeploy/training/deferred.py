"""Scalars of training steps that stay on the device until several steps can be read with one copy.

Reading a scalar of a GPU makes the host wait until everything queued before it is done, and leaves the GPU without
work meanwhile. The loops therefore keep loss and accuracy of each step on the device and look at them some steps
later: progress is reported in batches, and a loss that is not finite is noticed late, but with the number of its step.
A loop flushes before it saves or returns anything, so that nothing diverged gets out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS_PER_REPORT = 10


@dataclass(frozen=True)
class StepReport:
    """Values of one training step, on the host."""

    step: int
    values: dict[str, float]


class DeferredScalars:
    """Scalars of the steps since the last report, by step.

    >>> deferred = DeferredScalars(every=2)
    >>> deferred.add(0, loss=torch.tensor(0.5), lr=0.1)
    []
    >>> [(report.step, report.values["loss"]) for report in deferred.add(1, loss=torch.tensor(0.25), lr=0.1)]
    [(0, 0.5), (1, 0.25)]
    """

    def __init__(self, *, every: int) -> None:
        """Start without any step.

        Args:
            every: steps per report, the same on all processes that train together: each finds a divergence by
                itself, and one that goes on alone would wait for the others.
        """
        self.every = every
        self._steps: list[tuple[int, dict[str, Tensor | float]]] = []

    @property
    def is_empty(self) -> bool:
        """True if all steps have been returned."""
        return not self._steps

    def add(self, step: int, **values: Tensor | float) -> list[StepReport]:
        """Take the values of a step, scalars on one device or numbers; return the steps that are due, mostly none."""
        kept = {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}
        self._steps.append((step, kept))
        return self.flush() if len(self._steps) >= self.every else []

    def flush(self) -> list[StepReport]:
        """Return all steps that have not been returned yet, in order, with one copy to the host."""
        steps, self._steps = self._steps, []
        read = iter(_to_host([value for _, values in steps for value in values.values() if isinstance(value, Tensor)]))
        return [
            StepReport(step, {name: next(read) if isinstance(v, Tensor) else v for name, v in values.items()})
            for step, values in steps
        ]


def steps_per_report(device: torch.device) -> int:
    """Return how many steps are read at once: one on the CPU, which has nothing to wait for."""
    return 1 if device.type == "cpu" else _STEPS_PER_REPORT


def _to_host(scalars: Sequence[Tensor]) -> list[float]:
    """Read scalars of one device exactly: mixed types are promoted to one that holds both."""
    return [float(value) for value in torch.stack(list(scalars)).tolist()] if scalars else []
