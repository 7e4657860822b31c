"""SIGTERM, which schedulers send before they kill, ends a program as Ctrl-C does: with its files in order.

A loop that can save holds both back to the end of its step (`held_interrupts`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from passdeploy.errors import MissingError, PeerError

GRACE_S = 5.0  # until an interrupt that is held back ends the program wherever it is


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, raised wherever the program is."""


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Raise `TerminatedError` in the main thread at SIGTERM inside the block, unless a handler is set already."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class HeldInterrupts:
    """An interrupt that waits until the program is where it can save."""

    def __init__(self) -> None:
        self._number: int | None = None  # of the signal that waits
        self._has_alarm = False
        self._may_take_long = False  # what the program does now

    @property
    def is_pending(self) -> bool:
        """True once a signal waits."""
        return self._number is not None

    def raise_pending(self) -> None:
        """Raise what the signal that waits would have raised at once; nothing if there is none."""
        self.stop_alarm()
        if self._number is not None:
            _HANDLERS[self._number](self._number, None)

    def hold(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first one waits, for `GRACE_S` at most, and a second one ends that."""
        if self.is_pending:
            self.raise_pending()
        self._number = number
        if (
            not self._may_take_long
            and hasattr(signal, "setitimer")
            and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
        ):
            self._has_alarm = True
            signal.signal(signal.SIGALRM, self.hold)
            signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    @contextmanager
    def without_alarm(self) -> Iterator[None]:
        """Let what is done inside the context, such as saving, take longer than `GRACE_S`."""
        self.stop_alarm()
        self._may_take_long = True
        try:
            yield
        finally:
            self._may_take_long = False

    def stop_alarm(self) -> None:
        """Let the signal that waits go on waiting after `GRACE_S`."""
        if self._has_alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            self._has_alarm = False


@contextmanager
def held_interrupts() -> Iterator[HeldInterrupts]:
    """Hold SIGINT and SIGTERM back inside the block; one that still waits at its end is raised there.

    Only in the main thread, and only where they end the program as Python and `ending_on_sigterm` have it.
    """
    held = HeldInterrupts()
    is_main = threading.current_thread() is threading.main_thread()
    numbers = [number for number, handler in _HANDLERS.items() if is_main and signal.getsignal(number) is handler]
    for number in numbers:
        signal.signal(number, held.hold)
    try:
        yield held
    except (PeerError, MissingError):
        if not held.is_pending:  # else the signal has ended others as well, such as a peer, which is no news
            raise
    finally:
        held.stop_alarm()
        for number in numbers:
            if signal.getsignal(number) == held.hold:  # `_raise` leaves SIGTERM ignored
                signal.signal(number, _HANDLERS[number])
    held.raise_pending()


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the end
    raise TerminatedError


_HANDLERS: dict[int, Callable[[int, FrameType | None], Any]] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: _raise,
}
