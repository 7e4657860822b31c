"""SIGTERM, which schedulers send before they kill, ends a program as Ctrl-C does: with its files in order."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, raised wherever the program is."""


def end_on_sigterm_() -> None:
    """Raise `TerminatedError` in this process's main thread at SIGTERM, unless a handler is set already."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the end
    raise TerminatedError
