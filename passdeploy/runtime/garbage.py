"""Keep Python's garbage collector out of the way for a while."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """No garbage is collected in here, unless somebody asks for it; as a decorator, too.

    A collection stops a call that is timed; and one that runs while a library holds a lock, as TensorRT does while it
    calls our logger, waits for that lock forever when it destroys an object of that library.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
