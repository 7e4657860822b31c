"""Threads that decode images, none of which can keep the program waiting for ever.

A read from a network disk that is gone does not return, and no thread can be ended from outside. These are daemon
threads, which `concurrent.futures` has not: one that hangs is named in an error and left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread, get_ident
from time import monotonic
from types import TracebackType
from typing import Generic, TypeVar

from passdeploy.data.images import ImageSource
from passdeploy.errors import MissingError

HANG_S = 60.0  # a worker that is at one image for longer than this, and up to twice as long, hangs
_PATIENCE_S = 5.0  # for what is being decoded when the threads are given up early

Result = TypeVar("Result")


class DecodingThreads(Generic[Result]):
    """A pool of threads for one function of an image's number; a context manager ends them.

    Args:
        count: of threads.
        decode: what is done with an image of `source`, by its number.
        source: names the image at which a thread hangs.
    """

    def __init__(self, count: int, decode: Callable[[int], Result], source: ImageSource) -> None:
        self._function, self._source = decode, source
        self._tasks: SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = SimpleQueue()
        self._images: dict[int, tuple[int, float]] = {}  # thread -> the image that it is at, and since when
        self._threads = [Thread(target=self._work, name="passdeploy-decoding", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> DecodingThreads[Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel what has not begun, and wait for the rest, though not for a thread that hangs."""
        with suppress(Empty):
            while (left := self._tasks.get_nowait()) is not None:
                left[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        until = monotonic() + (_PATIENCE_S if error else HANG_S)
        for thread in self._threads:
            thread.join(0.0 if isinstance(error, HangError) else max(0.0, until - monotonic()))

    def decode(self, index: int) -> Result:
        """Call the function in a thread of the pool."""
        self._images[get_ident()] = index, monotonic()
        try:
            return self._function(index)
        finally:
            del self._images[get_ident()]

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Queue work, which calls `decode`; its end and its error are those of `require_done`."""
        future: Future[None] = Future()
        self._tasks.put((future, work))
        return future

    def require_done(self, tasks: Sequence[Future[None]]) -> None:
        """Wait for tasks; of several errors, that of the first task is raised.

        Raises:
            HangError: a thread is at one image for too long.
        """
        for task in tasks:
            before: dict[int, tuple[int, float]] = {}
            while wait([task], HANG_S).not_done:
                for thread, at in list(self._images.items()):
                    if before.get(thread) == at:
                        raise HangError.at(_name_of(self._source, at[0]))
                before = dict(self._images)
            task.result()

    def map(self, indices: Sequence[int]) -> list[Result]:
        """Decode images; errors and hangs are those of `require_done`."""
        results: dict[int, Result] = {}

        def keep(index: int) -> None:
            results[index] = self.decode(index)

        tasks = [self.submit(partial(keep, index)) for index in indices]
        self.require_done(tasks)
        return [results[index] for index in indices]

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, work = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                work()
            except BaseException as error:  # raised where the task is waited for
                future.set_exception(error)
            else:
                future.set_result(None)


class HangError(MissingError):
    """A worker that does not answer any more."""

    @classmethod
    def at(cls, image: str | None) -> HangError:
        """Make the error, with the image that the worker is at, if that is known."""
        where = f"has been at {image} for more than {HANG_S:.0f} s" if image else f"does nothing for {HANG_S:.0f} s"
        return cls(
            f"a worker that decodes images {where}.\n"
            "Can this file be read at all? A network disk may be gone; with prune, --resume goes on from what is saved."
        )


def _name_of(source: ImageSource, index: int) -> str:
    return source.paths[index] if source.paths else f"image {index}"
