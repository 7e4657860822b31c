"""Pauses of Python's garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause automatic garbage collection in a block or a decorated function; `gc.collect()` still works.

    A collection would lengthen a call that is timed. It can also deadlock: TensorRT holds a lock while it calls our
    logger, and an object of TensorRT that is collected at that moment waits for the same lock.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
