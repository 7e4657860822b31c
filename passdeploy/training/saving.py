"""When loops that train save their state: about once a minute, and before an interrupt ends the program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor

from passdeploy.errors import RunError
from passdeploy.runtime.distributed import SINGLE_PROCESS, Processes
from passdeploy.runtime.interrupts import HeldInterrupts, TerminatedError, held_interrupts
from passdeploy.training.deferred import DeferredScalars
from passdeploy.training.step import divergence

EVERY_S = 60.0
_LARGEST_SHARE = 0.05  # of the time that saving may take; where it is slow, a state is saved less often


class Checkpoint(Protocol):
    """Storage for the state of a training; `RunFolder.checkpoint` makes one."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Load the newest tensors and facts that were saved completely; None if there are none."""

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Save tensors (as safetensors) and facts (as JSON) in place of earlier ones."""


class State(Protocol):
    """State of a loop between two of its steps."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as tensors by name, and as facts that JSON stores exactly."""

    @property
    def trained(self) -> Iterable[Tensor]:
        """Tensors that are finite unless the training diverged."""


class Saving:
    """Decision after every step of a loop whether its state is saved.

    Args:
        checkpoint: where to; None: nowhere.
        interrupts: that wait for the end of a step; None: they do not wait.
        processes: that train together, and stop after the same step.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        interrupts: HeldInterrupts | None,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self._checkpoint, self._interrupts, self._processes = checkpoint, interrupts, processes
        self._stops = False  # after this step, since one of the processes was interrupted
        self._next_s = perf_counter() + EVERY_S

    def is_wanted(self, unread: DeferredScalars) -> bool:
        """Tell whether to save after this step; the loop must read all its losses before.

        Args:
            unread: losses that are still on a GPU. To wait for it only to save would cost time, and where several
                processes train together, each has to find a divergence at the same step.
        """
        if self._processes.count == 1 or unread.is_empty:  # that is after the same steps in every process
            self.agree()
        if self._stops:
            return True
        return self._checkpoint is not None and unread.is_empty and perf_counter() >= self._next_s

    def agree(self) -> None:
        """Decide whether to stop now; several processes, which all call this after the same step, decide together."""
        if self._interrupts:
            self._stops = self._processes.any(self._interrupts.is_pending)

    def save(self, state: State) -> bool:
        """Save a state, raise the interrupt that waits for it, and return if there was something to save.

        Weights that are not finite are not saved: the loss of the next step will say so.
        """
        with self._interrupts.without_alarm() if self._interrupts else nullcontext():
            is_saved = self._checkpoint is not None and not divergence(0.0, state.trained)
            if self._checkpoint is not None and is_saved:
                began = perf_counter()
                self._checkpoint.save(*state.state_dict())
                ended = perf_counter()
                self._next_s = ended + max(EVERY_S, (ended - began) / _LARGEST_SHARE)
        if self._interrupts and (self._stops or self._processes.count == 1):
            self._interrupts.raise_pending()
        if self._stops:
            raise TerminatedError  # another process was interrupted, and this one is about to be
        return is_saved


@contextmanager
def saving(checkpoint: Checkpoint | None, processes: Processes) -> Iterator[Saving]:
    """Hold interrupts back inside the block, where a loop saves its state by the `Saving` that it is given.

    Args:
        checkpoint: None: nothing is saved, and interrupts are raised at once.
        processes: that train together; the first one saves.
    """
    if checkpoint is None:
        yield Saving(None, None)
        return
    with held_interrupts() as interrupts:
        yield Saving(checkpoint if processes.is_first else None, interrupts, processes)


def named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `<prefix>.`, by the rest of their names."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under names that begin with `<prefix>.`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def require_same_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that a state was saved with the settings that go on with it.

    Raises:
        RunError: it was not; names what changed.
    """
    changed = sorted(key for key in {*saved, *own} if saved.get(key) != own.get(key))
    if changed:
        raise RunError(
            f"the checkpoint was made with other settings: {', '.join(changed)} changed since.\n"
            "Resume with the recipe and the images of the run, or start a new run without --resume."
        )
