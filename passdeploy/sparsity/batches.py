"""Batches that masks are learned from: walked again and again, of images and targets or of any form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

from torch import Tensor

from passdeploy.errors import DataError, UsageError
from passdeploy.sparsity.batch_loss import BatchLoss


@dataclass(frozen=True)
class SeekableBatches:
    """Endless batches that can be started at any of them, so that learning that goes on makes none it has seen.

    Args:
        start: number of a batch -> iterator over it and all after it, the same ones every time.
    """

    start: Callable[[int], Iterator[Any]]

    def __call__(self) -> Iterator[Any]:
        """Start at the first one."""
        return self.start(0)


Batches = Iterable[Any]  # (inputs, targets), or whatever a `BatchLoss` takes
Stream: TypeAlias = Batches | Callable[[], Batches]  # batches, or a function that starts the same ones
Loss = Callable[[Tensor, Tensor], Tensor] | BatchLoss


def started(batches: Stream, first: int = 0) -> Iterator[Any]:
    """Start to iterate the batches from the one of this number; those before it are walked, if they must be."""
    if isinstance(batches, SeekableBatches):
        return batches.start(first)
    return islice(batches() if callable(batches) else batches, first, None)


def repeated(batches: Stream, first: int = 0) -> Iterator[Any]:
    """Repeat the batches without end, from the one of this number.

    Raises:
        DataError: they can be walked only once.
    """
    return batches.start(first) if isinstance(batches, SeekableBatches) else islice(_repeated(batches), first, None)


def _repeated(batches: Stream) -> Iterator[Any]:
    while True:
        had_any = False
        for batch in started(batches):
            had_any = True
            yield batch
        if not had_any:
            raise DataError("the batches can be walked only once.\nHand in a list, a loader, or a function.")


def first_batch(batches: Stream) -> Any:
    """Return the first batch.

    Raises:
        DataError: there is none.
    """
    for batch in started(batches):
        return batch
    raise DataError("there is no batch to learn masks from.\nHand in batches that can be walked more than once.")


def inputs_in(batch: Any, loss: Loss) -> Tensor:
    """Return the inputs in a batch of inputs and targets.

    Raises:
        UsageError: nobody can tell what the inputs are.
    """
    if isinstance(loss, BatchLoss):
        raise UsageError(
            "batches of a BatchLoss have any form, so none can be traced.\nGive example_inputs=, as to find_groups."
        )
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        raise UsageError(
            f"a batch must be (inputs, targets) with one tensor of inputs; this one is a {type(batch).__name__}.\n"
            "For batches of another form give a BatchLoss, and example_inputs="
        )
    return batch[0]


def samples_in(batch: Any, loss: Loss) -> int:
    """Count the samples of a batch, which weigh it among several processes; of a `BatchLoss` all weigh the same."""
    return 1 if isinstance(loss, BatchLoss) else len(batch[0])
